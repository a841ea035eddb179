"""Flags that the scripts share, as dataclasses for `HfArgumentParser`; each script adds its own on top.

Nothing here imports torch, so that ``--help`` and a mistyped flag answer at once.
"""

import dataclasses
import difflib
import os
import sys
from dataclasses import dataclass

from transformers import HfArgumentParser


def flag(default, text: str, **metadata):
    """A dataclass field with a default and a help text; lists are copied for each instance."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": text, **metadata})
    return dataclasses.field(default=default, metadata={"help": text, **metadata})


LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
                 "inverse_sqrt")  # fmt: skip


class UsageError(ValueError):
    """Flags or files that a run cannot start from; shown to the user as one line, exit code 2."""


@dataclass
class DataArguments:
    train_file: str | None = flag(
        None,
        "training examples: JSON Lines (.xz and .gz too), JSON, CSV, Parquet, a folder or a Hub name; "
        "without data flags, the embedded data set",
    )
    validation_file: str | None = flag(None, "validation examples, in any of the same forms")
    documents_file: str | None = flag(None, "documents by `doc_id`, where the examples do not carry their own")
    validation_documents_file: str | None = flag(None, "likewise for the validation file [--documents_file]")
    dataset_config_name: str | None = flag(None, "configuration of a Hub data set")
    id_column: str = flag("id", "field of an example's id [the row number]")
    query_column: str = flag("query", "field of the question [no question]")
    document_column: str = flag("document", "field of the document as one text")
    passages_column: str = flag("passages", "field of the document as a list of passages")
    summary_column: str = flag("summary", "field of the reference summary, or of a list of them")
    evidence_column: str = flag("evidence", "field of the gold passages' numbers, from 0")
    passage_words: int = flag(100, "words in a passage at most, where documents are split or passages merged")
    merge_passages: bool = flag(False, "merge consecutive passages into chunks of --passage_words words")
    skip_bad_examples: bool = flag(False, "go on without unusable examples and list them in rejected.jsonl")
    max_train_examples: int | None = flag(None, "use the first N training examples only, for debugging")
    max_eval_examples: int | None = flag(None, "use the first N validation examples only, for debugging")
    sample_documents: int = flag(1500, "transcripts in the embedded training set, six examples each")


@dataclass
class TrainingArguments:
    output_dir: str = flag("outputs", "the run folder: arguments, metrics, predictions and the trained model")
    overwrite_output_dir: bool = flag(False, "write into a run folder that already holds a run")
    num_train_epochs: int = flag(3, "passes over the training examples; 0: no limit")
    max_train_steps: int = flag(0, "optimizer steps to train for; 0: no limit")
    per_device_train_batch_size: int = flag(16, "examples in a micro-batch on each device")
    per_device_eval_batch_size: int = flag(32, "examples in a batch on each device in validation")
    max_tokens: int = flag(
        0, "tokens in a micro-batch on each device, padding included, instead of a number of examples; 0: off"
    )
    gradient_accumulation_steps: int = flag(1, "micro-batches on each device in an optimizer step")
    learning_rate: float = flag(1e-3, "peak learning rate")
    lr_scheduler_type: str = flag("linear", f"learning rate over the steps: {', '.join(LR_SCHEDULERS)}")
    num_warmup_steps: int = flag(100, "optimizer steps over which the learning rate rises")
    weight_decay: float = flag(0.01, "AdamW's weight decay; biases and norms have none")
    adam_beta1: float = flag(0.9, "AdamW's first moment decay")
    adam_beta2: float = flag(0.98, "AdamW's second moment decay")
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon")
    max_grad_norm: float = flag(1.0, "gradient norm above which gradients are scaled down; 0: never")
    eval_steps: int = flag(0, "optimizer steps between validations; 0: at the end of each epoch")
    log_steps: int = flag(100, "optimizer steps between log lines")
    log_format: str = flag("simple", "standard output as `simple` lines, as `json`, or `none`")
    dataloader_num_workers: int = flag(0, "worker processes that prepare batches, for each process")
    seed: int = flag(42, "seed of everything that is random")

    def __post_init__(self):
        if not self.num_train_epochs and not self.max_train_steps:
            raise UsageError("nothing would end the training: set --num_train_epochs or --max_train_steps")
        check_at_least(1, self, "per_device_train_batch_size", "per_device_eval_batch_size",
                       "gradient_accumulation_steps", "log_steps", "passage_words", "sample_documents",
                       "max_train_examples", "max_eval_examples")  # fmt: skip
        check_at_least(0, self, "num_train_epochs", "max_train_steps", "max_tokens", "num_warmup_steps",
                       "max_grad_norm", "learning_rate", "weight_decay", "eval_steps", "dataloader_num_workers", "seed",
                       "adam_beta1", "adam_beta2", "adam_epsilon")  # fmt: skip
        check_choice("--lr_scheduler_type", self.lr_scheduler_type, LR_SCHEDULERS)
        check_choice("--log_format", self.log_format, ("simple", "json", "none"))


def check_at_least(least: int, arguments, *names: str) -> None:
    """UsageError if one of the flags named is set to less than `least`, or to nan."""
    for name in names:
        value = getattr(arguments, name, None)
        if value is not None and not least <= value < float("inf"):
            raise UsageError(f"--{name} {value}: {least} or more is wanted")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """UsageError unless `value` is one of `choices`."""
    if value not in choices:
        raise UsageError(f"{name} {value}: choose one of {', '.join(choices)}")


class _Parser(HfArgumentParser):
    def error(self, message: str):
        """One line instead of a page of usage, with the flag that was probably meant."""
        known = [option for action in self._actions for option in action.option_strings]
        for word in message.partition("unrecognized arguments: ")[2].split():
            if near := difflib.get_close_matches(word.partition("=")[0], known, n=1):
                message += f"; did you mean {near[0]}?"
        if os.environ.get("RANK", "0") == "0":  # once, however many processes were started
            print(f"{self.prog}: error: {message} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)


def parse(arguments_class, description: str):
    """Parses the command line into `arguments_class`; a mistake ends the program with one line and exit code 2."""
    parser = _Parser(arguments_class, description=description.partition("\n\n")[0], allow_abbrev=False)
    try:
        arguments, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    except UsageError as error:
        parser.error(str(error))
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return arguments
