"""Means against the loss of accuracy that need no training: each changes weights or scales, from calibration images."""
