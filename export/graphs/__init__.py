"""The graphs that this project writes itself, one file for each shape of model."""
