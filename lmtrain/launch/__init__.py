"""Starting a job on several hosts: `lmtrain launch`, a thin door before the `deepspeed` command."""
