"""The command line. Commands are imported when they run: `--help` takes a tenth of a second."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from kubetune_kubectl.errors import PluginError
from kubetune_kubectl.kubectl import Kubectl

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

PROGRAM: Final = "kubectl finetune"
CANNOT: Final = 2
"""Exit code where the question could not be answered; argparse's for a wrong command line too."""
INTERRUPTED: Final = 128 + signal.SIGINT
_EXIT_CODES: Final = """
exit codes:
  0  done; for status and watch: the job has succeeded
  1  the job has failed
  2  it could not be done: wrong command line, no such job, no rights, no cluster
  3  status NAME: the job is on its way
  4  status NAME: the job is suspended
  130  interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # looking for them takes a tenth of a second
    signal.signal(signal.SIGTERM, _leave)  # so that what was made is removed, and a terminal's cursor comes back
    signal.signal(signal.SIGHUP, _leave)
    kubectl = Kubectl(options.context, options.kubeconfig, options.namespace)
    try:
        code: int = options.run(kubectl, options)
        sys.stdout.flush()
    except PluginError as error:
        print(f"error: {error}", file=sys.stderr)
        return CANNOT
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return code


def _leave(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Submit, follow and fetch FineTuneJobs.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[_common(argparse.SUPPRESS)],
    )
    parser.set_defaults(namespace=None, context=None, kubeconfig=None)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_submit, _status, _watch, _logs, _suspend, _resume, _report):
        add(commands)
    return parser


def _common(default: str) -> argparse.ArgumentParser:
    """The flags that are taken before and behind the command."""
    common = argparse.ArgumentParser(add_help=False, argument_default=default)
    group = common.add_argument_group("cluster")
    group.add_argument("-n", "--namespace", metavar="NAME", help="namespace; without it, the context's")
    group.add_argument("--context", metavar="NAME", help="context of the kubeconfig")
    group.add_argument("--kubeconfig", metavar="FILE", help="kubeconfig; without it, as for kubectl")
    return common


def _command(commands: "Commands", name: str, text: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=text, description=text, parents=[_common(argparse.SUPPRESS)])


def _json_flag(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("-o", "--format", choices=["json"], help=f"print {what} as JSON on standard output")


def _submit(commands: "Commands") -> None:
    parser = _command(commands, "submit", "Check a FineTuneJob and hand it to the cluster.")
    parser.add_argument("file", metavar="FILE", help="manifest with one FineTuneJob; - is standard input")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="set a field below spec, such as training.epochs=3, or metadata.name; null removes one; may be repeated",
    )
    parser.add_argument("-w", "--watch", action="store_true", help="follow the job until it ends")
    parser.add_argument("--dry-run", action="store_true", help="let the server check it, and create nothing")
    _json_flag(parser, "the job")

    def run(kubectl: Kubectl, options: argparse.Namespace) -> int:
        from kubetune_kubectl import submit

        return submit.run(
            kubectl,
            options.file,
            options.set,
            dry_run=options.dry_run,
            then_watch=options.watch,
            as_json=options.format == "json",
        )

    parser.set_defaults(run=run)


def _status(commands: "Commands") -> None:
    parser = _command(commands, "status", "Show all jobs, or all that is known of one.")
    parser.add_argument("name", metavar="NAME", nargs="?", help="without it, all jobs of the namespace")
    parser.add_argument("-A", "--all-namespaces", action="store_true", help="all jobs of the cluster")
    _json_flag(parser, "the job, or the list of jobs,")

    def run(kubectl: Kubectl, options: argparse.Namespace) -> int:
        from kubetune_kubectl import status

        as_json = options.format == "json"
        if options.name is None:
            return status.run_all(kubectl, options.all_namespaces, as_json)
        if options.all_namespaces:
            parser.error("NAME and --all-namespaces exclude each other: a name is one of a namespace")
        return status.run_one(kubectl, options.name, as_json)

    parser.set_defaults(run=run)


def _watch(commands: "Commands") -> None:
    parser = _command(commands, "watch", "Follow a job until it ends: progress, loss, rates, pods, reasons.")
    parser.add_argument("name", metavar="NAME")

    def run(kubectl: Kubectl, options: argparse.Namespace) -> int:
        from kubetune_kubectl import watch

        return watch.run(kubectl, options.name)

    parser.set_defaults(run=run)


def _logs(commands: "Commands") -> None:
    text = "Show the log that matters: of rank 0, of the rank that failed, or of the staging pod."
    parser = _command(commands, "logs", text)
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what comes, in later attempts too")
    parser.add_argument("--rank", metavar="N", type=int, help="the pod in which this rank runs")
    parser.add_argument("--attempt", metavar="N", type=int, help="an attempt; without it, the present one")
    parser.add_argument("--previous", action="store_true", help="the attempt before")

    def run(kubectl: Kubectl, options: argparse.Namespace) -> int:
        from kubetune_kubectl import logs

        wanted = logs.Wanted(options.rank, options.attempt, options.previous)
        return logs.run(kubectl, options.name, wanted, options.follow)

    parser.set_defaults(run=run)


def _suspend(commands: "Commands") -> None:
    _switch(commands, "suspend", suspended=True, text="Let a job save a checkpoint and give its workers back.")


def _resume(commands: "Commands") -> None:
    _switch(commands, "resume", suspended=False, text="Let a suspended job go on from its checkpoint.")


def _switch(commands: "Commands", verb: str, suspended: bool, text: str) -> None:
    parser = _command(commands, verb, text)
    parser.add_argument("name", metavar="NAME")
    until = "no worker is left" if suspended else "the workers run"
    parser.add_argument("--wait", action="store_true", help=f"return when {until}, or the job has ended")
    _json_flag(parser, "the job")

    def run(kubectl: Kubectl, options: argparse.Namespace) -> int:
        from kubetune_kubectl import suspend

        return suspend.run(
            kubectl, options.name, suspended=suspended, wait=options.wait, as_json=options.format == "json"
        )

    parser.set_defaults(run=run)


def _report(commands: "Commands") -> None:
    text = "Fetch the loss picture, the metrics and the samples of a run from its output volume, and sum them up."
    parser = _command(commands, "report", text)
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--output", metavar="DIR", type=Path, help="folder for the files; without it, named as the run")
    parser.add_argument("--image", help="image of the pod that reads the volume; without it, that of the job's workers")
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=float, default=300, help="wait for that pod to start (default: 300)"
    )
    _json_flag(parser, "the summary")

    def run(kubectl: Kubectl, options: argparse.Namespace) -> int:
        from kubetune_kubectl import report

        return report.run(
            kubectl,
            options.name,
            output=options.output,
            image=options.image,
            timeout=options.timeout,
            as_json=options.format == "json",
        )

    parser.set_defaults(run=run)


if __name__ == "__main__":
    sys.exit(main())
