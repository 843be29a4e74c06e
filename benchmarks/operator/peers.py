"""What others publish of their operators. Nothing of it was measured here: other machines, other work."""

from typing import Final

from benchmarks.figures import Table

PEERS: Final = Table(
    title="What others publish",
    note="Not measured here, and on other machines: it tells orders of magnitude. Each figure is from the page named.",
    columns=("operator", "what", "figure", "source"),
    rows=(
        (
            "Kubeflow Spark Operator 2.1.0",
            "jobs it starts, 10 workers, about 25 cores in use, 36-core machine, EKS",
            "130 jobs/min (2.2 jobs/s)",
            "[Kubeflow: Spark Operator benchmarks]"
            "(https://www.kubeflow.org/docs/components/spark-operator/performance/benchmarking/)",
        ),
        (
            "Kubeflow Spark Operator 2.1.0",
            "the same with 20 workers, 35 cores in use",
            "140-150 jobs/min (2.4 jobs/s)",
            "the same page",
        ),
        (
            "Kubeflow Spark Operator 2.1.0",
            "longest wait until the driver's pod of one of 6,000 jobs that came at 1,000/min",
            "about 1 h",
            "the same page",
        ),
        (
            "EMR on EKS Spark Operator 6.11.0",
            "most jobs that one operator takes",
            "about 30 jobs/min (0.5 jobs/s)",
            "[AWS: known factors of the Spark operator]"
            "(https://aws.github.io/aws-emr-containers-best-practices/scalability/docs/known-factors-spark-operator)",
        ),
        (
            "KubeRay 0.6.0",
            "operator's memory, no RayCluster",
            "21 MB",
            "[KubeRay: memory benchmark](https://docs.ray.io/en/latest/cluster/kubernetes/benchmarks/"
            "memory-scalability-benchmark.html), numbers in "
            "[experiment_figures.py](https://github.com/ray-project/kuberay/blob/"
            "16d72cb67c2fea3732126bd7cd0b75295e168fbe/benchmark/memory_benchmark/scripts/experiment_figures.py)",
        ),
        ("KubeRay 0.6.0", "operator's memory, 150 RayClusters of one pod", "36 MB", "the same pages"),
        (
            "KubeRay 1.1.1",
            "1,000 RayJobs (fine-tuning and image resizing), created in 11 s, until all are complete, GKE",
            "917 s (1.1 jobs/s)",
            "[KubeRay: 1000-rayjob/results/junit.xml](https://github.com/ray-project/kuberay/blob/"
            "e21e26b550b453eeb14e55af24a2888ebf35608c/benchmark/perf-tests/1000-rayjob/results/junit.xml)",
        ),
        (
            "Kueue (scheduler alone, jobs played)",
            "15,000 workloads of 0.2 to 1 s in 30 queues, mean of 5 runs",
            "351 s (43 workloads/s)",
            "[Kueue: baseline/rangespec.yaml](https://github.com/kubernetes-sigs/kueue/blob/"
            "056cce0e3ca9769195f53301dfe666f07c33ee9a/test/performance/scheduler/configs/baseline/rangespec.yaml)",
        ),
    ),
    command="read, not measured",
)
