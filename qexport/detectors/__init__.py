"""What comes in: a factory and a checkpoint, made static. torch begins here."""
