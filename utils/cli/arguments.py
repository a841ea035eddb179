"""Flags that the scripts share, as dataclasses; each script adds its own on top.

Nothing here imports torch or transformers, so that ``--help`` and a mistyped flag answer at once.
"""

import argparse
import dataclasses
import difflib
import inspect
import math
import os
import sys
import typing
from dataclasses import dataclass

from utils.errors import UsageError


def flag(default, text: str, *, at_least=None, at_most=None, above=None, choices: tuple[str, ...] = ()):
    """A dataclass field with a default, a help text and the values that are accepted."""
    limits = {"at_least": at_least, "at_most": at_most, "above": above, "choices": choices}
    return dataclasses.field(default=default, metadata={"help": text, **limits})


def check_values(arguments) -> None:
    """Raises UsageError for the first flag whose value is not accepted."""
    for field in dataclasses.fields(arguments):
        name, value, limits = field.name, getattr(arguments, field.name), field.metadata
        if value is None:
            continue
        if limits["choices"] and value not in limits["choices"]:
            raise UsageError(f"--{name} {value}: choose one of {', '.join(limits['choices'])}")
        if limits["at_least"] is not None and not limits["at_least"] <= value < math.inf:
            raise UsageError(f"--{name} {value}: {limits['at_least']} or more is wanted")
        if limits["above"] is not None and not limits["above"] < value < math.inf:
            raise UsageError(f"--{name} {value}: more than {limits['above']} is wanted")
        if limits["at_most"] is not None and value > limits["at_most"]:
            raise UsageError(f"--{name} {value}: {limits['at_most']} at most is wanted")


LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
                 "inverse_sqrt")  # fmt: skip
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab")
ENDLESS_SCHEDULERS = ("constant", "constant_with_warmup", "inverse_sqrt")


# Flags that may change when a run is resumed: they decide when it ends, what is validated, kept and shown. Flags of
# data and batches are not compared, but data and batches are (see `Checkpoints.fingerprint`).
MAY_CHANGE = frozenset(
    """
    output_dir num_train_epochs max_train_steps stop_time_hours stop_min_lr patience eval_steps eval_after_steps
    checkpointing_steps checkpoints_total_limit metric_for_best greater_is_better load_best_model_at_end
    resume_from_checkpoint allow_reshard init_from reset_optimizer reset_lr_scheduler reset_dataloader reset_meters
    per_device_train_batch_size per_device_eval_batch_size max_tokens gradient_accumulation_steps curriculum_epochs
    group_by_document gradient_cache_tokens dataloader_num_workers mixed_precision max_skipped_steps nan_detector
    min_loss_scale check_weight_norm log_steps log_format report_to profile top_k retriever drafts_file
    validation_drafts_file ranking bm25_weight smooth_window smooth_decay index trec_run
    """.split()
)


@dataclass
class ReadingArguments:
    """How files of examples are read."""

    documents_file: str | None = flag(None, "documents by `doc_id`, where the examples do not carry their own")
    dataset_config_name: str | None = flag(None, "configuration of a Hub data set")
    id_column: str = flag("id", "field of an example's id [the row number]")
    query_column: str = flag("query", "field of the question [no question]")
    document_column: str = flag("document", "field of the document as one text")
    passages_column: str = flag("passages", "field of the document as a list of passages")
    summary_column: str = flag("summary", "field of the reference summary, or of a list of them")
    evidence_column: str = flag("evidence", "field of the gold passages' numbers, from 0; of their ids in a corpus")
    passage_words: int = flag(
        100, "words in a passage at most, where documents are split or passages merged", at_least=1
    )
    merge_passages: bool = flag(False, "merge consecutive passages into chunks of --passage_words words")
    skip_bad_examples: bool = flag(False, "go on without unusable examples and list them in rejected.jsonl")

    def reading_options(self) -> dict:
        """These flags, less the documents file, as keywords of `load_examples`."""
        names = (field.name for field in dataclasses.fields(ReadingArguments) if field.name != "documents_file")
        return {name: getattr(self, name) for name in names}


@dataclass
class DataArguments(ReadingArguments):
    """What is trained on and validated with."""

    train_file: str | None = flag(
        None,
        "training examples: JSON Lines (.xz and .gz too), JSON, CSV, Parquet, a folder or a Hub name; "
        "without data flags, the embedded data set",
    )
    validation_file: str | None = flag(None, "validation examples, in any of the same forms")
    validation_documents_file: str | None = flag(None, "--documents_file of the validation file [--documents_file]")
    corpus_file: str | None = flag(
        None, "passages that all examples search, as BEIR keeps them: records of `_id`, `title` and `text`"
    )
    train_qrels_file: str | None = flag(
        None, "with a corpus: the training queries' evidence, in BEIR's three columns or TREC's four"
    )
    validation_qrels_file: str | None = flag(None, "likewise for the validation queries")
    max_train_examples: int | None = flag(None, "use the first N training examples only, for debugging", at_least=1)
    max_eval_examples: int | None = flag(None, "use the first N validation examples only, for debugging", at_least=1)
    sample_documents: int = flag(1500, "transcripts in the embedded training set, six examples each", at_least=1)


@dataclass
class RunArguments:
    """Where a run is kept and how it computes."""

    output_dir: str = flag("outputs", "the run folder")
    mixed_precision: str | None = flag(
        None,
        "no, bf16 or fp16 [accelerate's; bf16 for pretrained models where the machine has instructions for it]",
        choices=("no", "bf16", "fp16"),
    )
    deterministic: bool = flag(False, "use deterministic operations only")
    seed: int = flag(42, "seed of everything that is random", at_least=0)

    def __post_init__(self):
        check_values(self)


@dataclass
class GenerationArguments:
    """How a summarizer writes."""

    num_beams: int = flag(4, "beams in generation; 1: greedy", at_least=1)
    length_penalty: float = flag(1.0, "exponent of the length by which beam scores are divided")
    min_new_tokens: int = flag(0, "tokens generated at least", at_least=0)
    max_new_tokens: int = flag(128, "tokens generated at most", at_least=1)
    no_repeat_ngram_size: int = flag(0, "n-grams of this size are generated once only; 0: no limit", at_least=0)

    def generation(self) -> dict:
        """These flags as keywords of `Summarizer.generate`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(GenerationArguments)}


@dataclass
class TrainingArguments(RunArguments):
    """How a model is trained."""

    num_train_epochs: int = flag(3, "passes over the training examples; 0: no limit", at_least=0)
    max_train_steps: int = flag(0, "optimizer steps to train for; 0: no limit", at_least=0)
    stop_time_hours: float = flag(0.0, "hours to train for, over all resumed runs; 0: no limit", at_least=0)
    stop_min_lr: float = flag(-1.0, "stop when the learning rate falls to this; -1: never")
    patience: int = flag(-1, "stop after so many validations without improvement; -1: never")

    eval_steps: int = flag(0, "optimizer steps between validations; 0: at the end of each epoch", at_least=0)
    eval_after_steps: int = flag(0, "optimizer steps before the first validation", at_least=0)
    checkpointing_steps: int = flag(0, "optimizer steps between checkpoints; 0: at the end of each epoch", at_least=0)
    checkpoints_total_limit: int = flag(3, "checkpoints kept beside the best one; 0: all", at_least=0)
    metric_for_best: str = flag("loss", "validation score that decides which checkpoint is best, and patience")
    greater_is_better: bool | None = flag(None, "whether a higher score is better [not for loss, nll_loss and ppl]")
    load_best_model_at_end: bool = flag(False, "the model and what it writes are those of the best checkpoint")
    resume_from_checkpoint: str = flag(
        "auto", "auto: the newest valid checkpoint in the run folder, else start; none: start anew; or a checkpoint"
    )
    allow_reshard: bool = flag(False, "resume with another number of processes or another batch size")
    init_from: str | None = flag(None, "a checkpoint or run folder of another run, whose weights and state to take")
    reset_optimizer: bool = flag(False, "with --init_from: start with a new optimizer")
    reset_lr_scheduler: bool = flag(False, "with --init_from: start the learning rate schedule anew")
    reset_dataloader: bool = flag(False, "with --init_from: start with the first epoch and step")
    reset_meters: bool = flag(False, "with --init_from: forget the best score, patience and training time")

    per_device_train_batch_size: int = flag(16, "examples in a micro-batch on each device", at_least=1)
    per_device_eval_batch_size: int = flag(32, "examples in a batch on each device in validation", at_least=1)
    max_tokens: int = flag(
        0,
        "tokens in a micro-batch on each device, padding included, instead of a number of examples; 0: off",
        at_least=0,
    )
    gradient_accumulation_steps: str = flag(
        "1", "micro-batches on each device in an optimizer step; a list such as 4,2,1 gives each epoch its own"
    )
    curriculum_epochs: int = flag(0, "first epochs that run in order of length, unshuffled", at_least=0)
    dataloader_num_workers: int = flag(0, "worker processes that prepare batches, for each process", at_least=0)

    learning_rate: float = flag(1e-3, "peak learning rate", at_least=0)
    lr_scheduler_type: str = flag("linear", "learning rate over the steps", choices=LR_SCHEDULERS)
    num_warmup_steps: int = flag(
        100, "optimizer steps over which the learning rate rises, a tenth of all at most", at_least=0
    )
    weight_decay: float = flag(0.01, "AdamW's weight decay; biases and norms have none", at_least=0)
    adam_beta1: float = flag(0.9, "AdamW's first moment decay", at_least=0)
    adam_beta2: float = flag(0.98, "AdamW's second moment decay", at_least=0)
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon", at_least=0)
    max_grad_norm: float = flag(1.0, "gradient norm above which gradients are scaled down; 0: never", at_least=0)

    max_skipped_steps: int = flag(
        20, "dropped steps in a row (not finite, out of memory) after which the run ends", at_least=0
    )
    nan_detector: bool = flag(True, "name the first module with an output that is not finite")
    min_loss_scale: float = flag(1e-4, "loss scale of fp16 under which the run ends")
    check_weight_norm: bool = flag(True, "stop if the weights of the processes differ")

    log_steps: int = flag(100, "optimizer steps between log lines", at_least=1)
    log_format: str | None = flag(
        None, "tqdm, simple, json or none [tqdm on a terminal, else simple]", choices=("tqdm", "simple", "json", "none")
    )
    report_to: str | None = flag(None, "a tracker [none]", choices=TRACKERS)
    profile: bool = flag(False, "write a trace of a few steps to the run folder")
    overfit_one_batch: bool = flag(False, "train on the first step's examples only, for debugging")

    def __post_init__(self):
        super().__post_init__()
        rules = (self.num_train_epochs, self.max_train_steps, self.stop_time_hours, self.patience >= 0,
                 self.stop_min_lr >= 0)  # fmt: skip
        if not any(rules):
            raise UsageError(
                "nothing would end the training: set --num_train_epochs, --max_train_steps or another rule"
            )
        if not any(rules[:2]) and self.lr_scheduler_type not in ENDLESS_SCHEDULERS:
            raise UsageError(
                f"--lr_scheduler_type {self.lr_scheduler_type} needs --num_train_epochs or --max_train_steps; "
                f"without them choose one of {', '.join(ENDLESS_SCHEDULERS)}"
            )
        if self.lr_scheduler_type == "polynomial" and self.learning_rate <= 1e-7:
            raise UsageError(f"--learning_rate {self.learning_rate}: polynomial decay ends at 1e-7, give it more")
        if not all(part.isdecimal() and int(part) for part in self.gradient_accumulation_steps.split(",")):
            raise UsageError(
                f"--gradient_accumulation_steps {self.gradient_accumulation_steps}: "
                "a number, or a list such as 4,2,1, of 1 or more is wanted"
            )

    def decisive(self) -> dict:
        """The flags that decide what a step computes, beside data and batches. To resume, they must be the same."""
        others = {field.name for owner in (DataArguments, GenerationArguments) for field in dataclasses.fields(owner)}
        return {name: value for name, value in vars(self).items() if name not in MAY_CHANGE | others}

    def accumulation(self, epoch: int) -> int:
        """Micro-batches in a step of this epoch. The last number of a list holds for all later epochs."""
        each = [int(part) for part in self.gradient_accumulation_steps.split(",")]
        return each[min(epoch, len(each) - 1)]


def parse(arguments_class, description: str):
    """Parses the command line into `arguments_class`. A mistake ends the program with one line and exit code 2."""
    parser = Parser(description=description.partition("\n\n")[0], usage="%(prog)s [flags]")
    kinds, added = typing.get_type_hints(arguments_class), set()
    fields = {field.name: field for field in dataclasses.fields(arguments_class)}
    for owner in arguments_class.__mro__[:-1]:  # the script's own flags first
        group = parser.add_argument_group(owner.__doc__.rstrip("."))
        for name in inspect.get_annotations(owner):
            if name not in added:
                _add_flag(group, fields[name], kinds[name])
                added.add(name)
    known, unknown = parser.parse_known_args()
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return arguments_class(**vars(known))
    except UsageError as error:
        parser.error(str(error))


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations, whose errors are one line."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        """Prints one line with the flag that was probably meant, and exits with code 2."""
        known = [option for action in self._actions for option in action.option_strings]
        for word in message.partition("unrecognized arguments: ")[2].split():
            if near := difflib.get_close_matches(word.partition("=")[0], known, n=1):
                message += f"; did you mean {near[0]}?"
        if os.environ.get("RANK", "0") == "0":  # once, however many processes were started
            print(f"{self.prog}: error: {message} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)


def _add_flag(group, field: dataclasses.Field, kind) -> None:
    """`kind` is str, int, float or bool, or one of them or None."""
    default, text = field.default, field.metadata["help"].replace("%", "%%")
    choices = field.metadata["choices"]
    if len(choices) >= 5:
        text += f": {', '.join(choices)}"
    kind = next(part for part in (*typing.get_args(kind), kind) if part is not type(None))
    if default is not None:
        text += f" [{str(default).lower() if kind is bool else default}]"
    is_optional = {"nargs": "?", "const": True} if kind is bool else {}
    metavar = "|".join(choices) if 0 < len(choices) < 5 else METAVARS[kind]
    group.add_argument(f"--{field.name}", type=_truth if kind is bool else kind, default=default, help=text,
                       metavar=metavar, **is_optional)  # fmt: skip
    if kind is bool and default:
        group.add_argument(f"--no_{field.name}", dest=field.name, action="store_false", help=argparse.SUPPRESS)


METAVARS = {str: "TEXT", int: "N", float: "X", bool: "true|false"}


def _truth(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{word}: true or false is wanted")
    return word.lower() == "true"
