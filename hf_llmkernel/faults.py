"""What an exception means to the user of a command: an exit code and one line.

2 is bad usage or input, which the user can put right; 1 is a fault of the machine or of this program; 130 is an
interruption. Libraries' exceptions are told by name, for importing their libraries here would cost every start.
"""

import errno

INPUT, MACHINE, INTERRUPTED = 2, 1, 130

INPUT_ERRORS = {
    "EntryNotFoundError",
    "GatedRepoError",
    "RepositoryNotFoundError",
    "RevisionNotFoundError",
    "SafetensorError",
    "SafetensorsParsingError",
    "NotASafetensorsRepoError",
    "StrictDataclassError",
    "ValueError",
    "YAMLError",
}
INTERRUPTIONS = {"KeyboardInterrupt", "Abort"}
NETWORK_PACKAGES = ("requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2", "huggingface_hub")

# Of an operating system's errors, those about a path that the user named.
INPUT_ERRNOS = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "name a folder",
    errno.EISDIR: "name a file",
    errno.EEXIST: "choose another path or remove it",
    errno.ENOTEMPTY: "choose another folder or empty it",
    errno.EACCES: "change its permissions or choose another path",
    errno.EPERM: "change its permissions or choose another path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "check the links in the path",
    errno.EROFS: "choose a path that can be written",
}
FULL_DISK = {errno.ENOSPC, errno.EDQUOT}


def describe_fault(error: BaseException, usage: str) -> tuple[int, str]:
    """Exit code and one-line message of an exception; `usage` is the command that shows the help."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & INTERRUPTIONS:
        return INTERRUPTED, "interrupted"
    if hasattr(error, "format_message"):  # a usage error of the command line parser
        return INPUT, f"{one_line(error.format_message()).rstrip('.')}; see `{usage}`"  # type: ignore[attr-defined]
    if names & {"MemoryError", "OutOfMemoryError"} or "can't allocate memory" in str(error):
        return MACHINE, f"out of memory: {one_line(error)}; use a smaller model, batch or length, or free memory"
    if names & INPUT_ERRORS:
        return INPUT, one_line(_cause_of_strict(error, names))
    if isinstance(error, OSError):
        return describe_os_error(error)
    if isinstance(error, ImportError):
        return MACHINE, f"{one_line(error)}; install what is missing"
    kind = type(error).__name__
    return MACHINE, f"unexpected {kind}: {one_line(error)}; set LLMKERNEL_TRACEBACK=1 to see where"


def describe_os_error(error: OSError) -> tuple[int, str]:
    """An error of files, disks and the network. Without an errno it is a library's own word on its input."""
    where = f"{error.filename}: " if error.filename else ""
    what = f"{where}{error.strerror}" if error.strerror else one_line(error)
    if error.errno in FULL_DISK:
        return MACHINE, f"{what}; free space or choose another disk"
    if error.errno in INPUT_ERRNOS:
        return INPUT, f"{what}; {INPUT_ERRNOS[error.errno]}"
    if error.errno is not None:
        return MACHINE, what
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError | FileExistsError):
        return INPUT, what
    if isinstance(error, PermissionError):
        return INPUT, what
    from_network = type(error).__module__.partition(".")[0] in NETWORK_PACKAGES
    if from_network or isinstance(error, ConnectionError | TimeoutError):
        return MACHINE, f"{what}; check the network, or name a local folder"
    return INPUT, what


def one_line(message: object) -> str:
    """The message without line breaks; an exception without one gives its type's name."""
    return " ".join(str(message).split()) or type(message).__name__


def _cause_of_strict(error: BaseException, names: set[str]) -> BaseException:
    # The validators of configurations wrap the error that says what is wrong.
    cause = error.__cause__
    return cause if "StrictDataclassError" in names and isinstance(cause, ValueError) else error
