"""One module a file format. Each reads from a folder, checks all that it reads, and loads no pickle."""
