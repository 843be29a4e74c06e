"""What the operator and the trainer must agree on.

Here belong the run configuration with its bounds and cross-field rules, presets, paths inside the containers,
exit codes, and the documents that cross the wall: progress, termination message, staging manifest.
Here must not stand anything that needs torch, a Kubernetes client or the network: pydantic, YAML and the standard
library only.
"""
