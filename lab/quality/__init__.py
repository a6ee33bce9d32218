"""The quality of this project's artifacts beside that of other libraries', on the same checkpoint and tokens."""
