"""The end of a training run: the model card, and with `--push_to_hub` the model on the Hugging Face Hub."""

import json
import sys
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError

from utils.cli.script import hub_name
from utils.errors import in_one_line
from utils.models.settings import FILE as SETTINGS
from utils.processes import from_main
from utils.reporting import cards
from utils.training.checkpoint_files import OF_ONE_KIND

NOT_PUBLISHED = 69  # exit code: the model is in its folder, and not on the Hub


def present(run, kind: str, splits: dict, scores: dict) -> int:
    """Writes the model card of a run and publishes its model with `--push_to_hub`. Returns the run's exit code.

    Called on all processes; only the main one works. Arguments are those of `cards.card_writer`. If the Hub does not
    take the model, a line says why, and that the same command tries again.
    """

    def work() -> int:
        card = run.folder / cards.FILE
        if cards.is_edited(card):
            run.log.say(f"{card} was edited, or is not from here, and is kept; remove it to have it written again")
        write_card = cards.card_writer(run, kind, splits, scores)
        write_card(cards.local_name(run.args.output_dir))
        if not run.args.push_to_hub:
            return 0
        try:
            run.log.say(f"published {_push(run, write_card)}")
        except Exception as error:  # of many classes: of the client, the network, the disk
            print(f"{Path(sys.argv[0]).name}: error: the model is in {run.folder}, but it was not published: "
                  f"{_why(error, run.args)}; then run the same command again, which publishes it without training",
                  file=sys.stderr)  # fmt: skip
            return NOT_PUBLISHED
        return 0

    return from_main(run.accelerator, work)  # the others wait, however long the upload takes


class _Refused(Exception):
    """What the Hub would take, but must not get; the message names the remedy."""


def _push(run, write_card) -> str:
    """Uploads the files of the published model, and its card. Returns the repository's address."""
    args, api = run.args, HfApi(token=get_token())
    address = api.create_repo(hub_name(args), private=args.hub_private_repo, exist_ok=True)
    repository = address.repo_id
    if args.hub_private_repo is not None and api.model_info(repository).private != args.hub_private_repo:
        kind = "public" if args.hub_private_repo else "private"
        raise _Refused(f"{repository} is there already, and is {kind}; change that on the Hub, or --hub_private_repo")
    write_card(repository)
    with tempfile.TemporaryDirectory() as temporary:
        stage = Path(temporary) / "model"
        for file in run.published:
            (stage / file).parent.mkdir(parents=True, exist_ok=True)
            (stage / file).symlink_to((run.folder / file).resolve())
        settings = json.loads((stage / SETTINGS).read_text(encoding="utf-8"))
        settings["model_name_or_path"] = cards.public(settings["model_name_or_path"])  # no path of this machine
        (stage / SETTINGS).unlink()
        (stage / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        card = run.folder / cards.FILE  # one that was edited in the run folder goes to the Hub in any case
        if not cards.is_edited(card) and _is_edited_there(api, repository, temporary):
            run.log.say(f"the {cards.FILE} on the Hub was edited, or is not from here, and is kept")
        else:
            (stage / cards.FILE).symlink_to(card.resolve())
        api.upload_folder(repo_id=repository, folder_path=stage, delete_patterns=list(OF_ONE_KIND),
                          commit_message=f"Model of {Path(sys.argv[0]).name}")  # fmt: skip
    return str(address)


def _is_edited_there(api: HfApi, repository: str, folder: str) -> bool:
    """Whether somebody edited the card on the Hub, as to set a licence, so that it is not the one made here."""
    try:
        return cards.is_edited(Path(api.hf_hub_download(repository, cards.FILE, local_dir=folder)))
    except RemoteEntryNotFoundError:  # not the one that says that the Hub is not reached
        return False


def _why(error: Exception, args) -> str:
    """What went wrong, and the remedy."""
    if isinstance(error, _Refused):
        return str(error)
    if not isinstance(error, HfHubHTTPError):
        return f"{constants.ENDPOINT}: {in_one_line(error)}; look at the network, or at HF_ENDPOINT"
    response, remedy = error.response, "look at that, or at the Hub's status"
    if response.status_code in (401, 403):
        remedy = f"log in with `hf auth login`, or set HF_TOKEN, with a token that may write {hub_name(args)}"
    said = " ".join((error.server_message or response.reason_phrase).split()).rstrip(".")
    return f"{response.status_code} {said} ({response.url}); {remedy}"
