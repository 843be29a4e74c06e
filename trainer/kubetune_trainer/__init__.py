"""The trainer: a Llama model, its data, one training loop, checkpoints, exports and the `tune` command.

Here belongs everything that happens inside a worker or the staging container, and on a laptop without Kubernetes.
Here must not stand a Kubernetes client, nor a model library: transformers, peft and torchtune are the tests' peers.
"""
