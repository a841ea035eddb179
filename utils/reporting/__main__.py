"""Writes the report of a run again, or one page that compares several runs.

    python -m utils.reporting outputs/summarize                             # outputs/summarize/report.html
    python -m utils.reporting outputs/retrieve other/retrieve --output comparison.html

Folders are the --output_dir of runs of any script here. The scripts write report.html themselves: at each validation
and at the end.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from utils.cli.arguments import Parser
from utils.errors import DataError, UsageError


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m utils.reporting", description=__doc__.partition("\n\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="the --output_dir of a run")
    parser.add_argument("--output", type=Path, help="the page [FOLDER/report.html, or comparison.html of several]")
    parser.add_argument("--max_examples", type=int, default=300, help="most examples on the page [%(default)s]")
    parser.add_argument("--plots", action="store_true", help="also write the plots as PNG files, into plots/ beside it")
    args = parser.parse_args(arguments)
    if args.max_examples < 1:
        parser.error(f"--max_examples {args.max_examples}: must be at least 1")
    if len({folder.resolve() for folder in args.folders}) < len(args.folders):
        parser.error("a folder is named twice")
    is_one = len(args.folders) == 1
    output = args.output or (args.folders[0] / "report.html" if is_one else Path("comparison.html"))
    if args.output and (output.is_dir() or not output.resolve().parent.is_dir()):
        parser.error(f"--output {output}: must be a file in a folder that exists")

    from utils.reporting.folder import read_folder  # now, so that a mistyped flag answers at once
    from utils.reporting.plots import write_png
    from utils.reporting.report import write_page

    plots = write_page([read_folder(folder) for folder in args.folders], output, args.max_examples)
    print(f"wrote {output}")
    if args.plots:
        for plot in plots:
            print(f"wrote {write_png(plot, output.parent / 'plots')}")


if __name__ == "__main__":
    try:
        main()
    except (DataError, UsageError) as error:
        print(f"python -m utils.reporting: error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"python -m utils.reporting: error: {error}", file=sys.stderr)
        sys.exit(74)
