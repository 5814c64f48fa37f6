"""Artifacts run where their device is not: evaluated in torch, never timed."""
