"""Command lines from dataclasses: each setting and each error is one line.

Every script declares a `@dataclass` whose fields are `option(default, help)`; argparse derives `--help`, types and the
refusal of unknown flags from it. Exit codes: 0 success, 2 a wrong command line, 1 any other error that a user can fix.
"""

import argparse
import dataclasses
import errno
import io
import os
import sys

from minidistil import launcher
from minidistil.errors import RankError, UserError, is_out_of_memory

OUT_OF_MEMORY = "out of memory: use a smaller --batch (or --micro-batch), or a shorter --seq-len"


def option(default, help, **argparse_options):
    """Returns a dataclass field with its help text; extra options (`choices`, `nargs`, `metavar`) go to argparse."""
    return dataclasses.field(default=default, metadata={"help": help, **argparse_options})


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}: see `{self.prog} --help`\n")


def parse_args(settings_class, argv=None, description=None):
    """Returns the options given on the command line as a dict; `settings_class(**parse_args(...))` adds the defaults.

    A field without a default is positional. Underscores become hyphens; a bool is a flag without value.
    Exits with 2 and one line on a wrong command line.
    """
    parser = _Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(settings_class):
        options = dict(field.metadata)
        shown = f" (default: {field.default})" if field.default not in (None, False, dataclasses.MISSING) else ""
        options["help"] = (options["help"] + shown).replace("%", "%%")
        if field.default is dataclasses.MISSING:
            parser.add_argument(field.name, type=field.type, **options)
            continue
        flag = "--" + field.name.replace("_", "-")
        short = [options.pop("short")] if "short" in options else []
        if field.type is bool:
            options["action"] = "store_true"
            parser.add_argument(*short, flag, dest=field.name, default=argparse.SUPPRESS, **options)
        else:
            if "--resume" in (sys.argv[1:] if argv is None else argv):
                options.pop("required", None)  # a resumed run inherits it
            options.setdefault("metavar", None if "choices" in options else field.type.__name__.upper())
            parser.add_argument(*short, flag, dest=field.name, type=field.type, default=argparse.SUPPRESS, **options)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return {name: value for name, value in vars(parser.parse_args(argv)).items() if name != "debug"}


# errno -> what the user can do
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space or write elsewhere"),
    errno.EFBIG: "raise the limit on the size of files (ulimit -f) or write elsewhere",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a path that you may write and read"),
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another path",
    errno.EISDIR: "a folder stands where a file is needed; choose another path",
    errno.EEXIST: "choose another path",
    errno.EIO: "the disk failed; choose another path",
}


def describe_os_error(error):
    """Returns one line for an OSError: what failed, on which path, and how to fix it."""
    path = f" ({os.fsdecode(error.filename)})" if error.filename is not None else ""
    return f"{(error.strerror or str(error)).lower()}{path}: {_REMEDIES.get(error.errno, 'see --debug')}"


def run_script(main, argv=None, in_ranks=False):
    """Calls `main(argv)` and exits with its code; an error that the user can fix becomes one line on stderr.

    With `in_ranks` the script may be one of several processes, of which only rank 0 prints; others ignore a launcher.
    """
    if not in_ranks:
        launcher.forget()
    argv = sys.argv[1:] if argv is None else argv
    program = os.path.basename(sys.argv[0])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a path may be no text
    try:
        try:
            code = main(argv) or 0
        except SystemExit as end:
            if type(end.code) is not int or end.code < 128:
                raise
            code = end.code  # of a run that a signal interrupted
        if in_ranks and launcher.place().size > 1:  # at once: the interpreter's end has aborted a rank (LOG.md)
            sys.stdout.flush()
            os._exit(code)
        sys.exit(code)
    except (UserError, OSError, MemoryError) as error:
        if "--debug" in argv:
            raise
        if isinstance(error, BrokenPipeError):  # the reader (`| head`) closed our output: no message
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        if isinstance(error, OSError):
            message = describe_os_error(error)
        elif isinstance(error, MemoryError):
            message = OUT_OF_MEMORY
        else:
            message = " ".join(str(error).split())
        if launcher.speaks() or isinstance(error, RankError | MemoryError):
            who = "" if launcher.is_first() else f"rank {launcher.place().rank}: "
            print(f"{program}: error: {who}{message}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        # PyTorch's errors for exhausted memory, on either device, and for a rank that has ended with a message
        out_of_memory = is_out_of_memory(error)
        lost_rank = in_ranks and launcher.place().size > 1 and "onnection" in str(error)
        if "--debug" in argv or not (out_of_memory or lost_rank):
            raise
        if out_of_memory:
            print(f"{program}: error: {OUT_OF_MEMORY}", file=sys.stderr)
        elif launcher.is_first():
            print(f"{program}: error: rank 0 has lost another rank: see what that one has said", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(130)
