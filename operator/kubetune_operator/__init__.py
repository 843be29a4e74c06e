"""The operator: turns FineTuneJobs into staging Jobs, training Jobs and an honest status.

Here belong the reconcile logic, the API's models and the Kubernetes objects that follow from them.
Training itself, and everything that needs torch, belongs to the trainer; what both sides must agree on,
to the contract.
"""
