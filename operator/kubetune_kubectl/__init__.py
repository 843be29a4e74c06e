"""`kubectl finetune`: FineTuneJobs from a terminal, in the words of the CRD.

Here belongs what a person or a script does with one job: submit it, follow it, read its logs, stop it, fetch what it
left. Nothing here decides anything about a job: that is the operator's, whose models and names are used. What an
administrator does (installing, upgrading) belongs to helm and kubectl.

Every request goes through the `kubectl` on PATH, as a process. A Python client would need a second reading of
kubeconfig files, exec plugins, proxies, impersonation and certificates, and every place where it differs from kubectl
would be a cluster that kubectl reaches and the plugin does not. It also takes a second to import; kubectl answers in a
tenth of one. The price is that errors arrive as text: `kubectl.py` alone reads it, and its table is tested with what a
real API server and a real kubectl say.
"""
