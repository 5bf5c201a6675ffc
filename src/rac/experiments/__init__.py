"""Experiments of many trainings, or very short ones: sweeps over settings, ablations, speeds, the flow in the plane."""
