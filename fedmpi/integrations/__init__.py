"""Drop-ins for training jobs that fedmpi does not run: DDP, Horovod, transformers."""
