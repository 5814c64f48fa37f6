"""Run an artifact: one file a runtime, torch-free where the runtime is."""
