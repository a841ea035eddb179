"""Flags that the scripts share, as dataclasses; each script adds its own on top.

Nothing here imports torch or transformers, so that ``--help`` and a mistyped flag answer at once.
"""

import argparse
import dataclasses
import difflib
import itertools
import math
import os
import shutil
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UsageError, refuse


def flag(default, text: str, *, at_least=None, above=None, at_most=None, below=None, choices: tuple[str, ...] = ()):
    """A dataclass field with a default, a help text and the values that are accepted."""
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "below": below, "choices": choices}
    return dataclasses.field(default=default, metadata={"help": text, **limits})


def check_values(arguments) -> None:
    """Raises UsageError for the first flag whose value is not accepted."""
    for field in dataclasses.fields(arguments):
        name, value, limits = field.name, getattr(arguments, field.name), field.metadata
        if value is None:
            continue
        if limits["choices"] and value not in limits["choices"]:
            raise UsageError(f"--{name} {value}: choose one of {', '.join(limits['choices'])}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"--{name} {value}: must be a finite number")
        if limits["at_least"] is not None and value < limits["at_least"]:
            raise UsageError(f"--{name} {value}: must be at least {limits['at_least']}")
        if limits["above"] is not None and value <= limits["above"]:
            raise UsageError(f"--{name} {value}: must be greater than {limits['above']}")
        if limits["at_most"] is not None and value > limits["at_most"]:
            raise UsageError(f"--{name} {value}: must be at most {limits['at_most']}")
        if limits["below"] is not None and value >= limits["below"]:
            raise UsageError(f"--{name} {value}: must be less than {limits['below']}")
    least, most = (getattr(arguments, name, None) for name in ("min_new_tokens", "max_new_tokens"))
    if least is not None and most is not None and least > most:
        raise UsageError(f"--min_new_tokens {least}: must be at most --max_new_tokens {most}")
    count, pool = (getattr(arguments, name, None) or 0 for name in ("num_hard_negatives", "negatives_pool"))
    if count > pool > 0:
        raise UsageError(
            f"--num_hard_negatives {count}: must be at most --negatives_pool {pool}, which they are drawn from"
        )
    every, epochs = (getattr(arguments, name, 0) for name in ("mine_negatives_every", "num_train_epochs"))
    if 0 < epochs <= every and not _resumes(arguments):  # fewer epochs may end a run
        raise UsageError(f"--mine_negatives_every {every}: must be less than --num_train_epochs {epochs}")
    dims = getattr(arguments, "matryoshka_dims", "")
    numbers = [int(part) if part.isdecimal() else 0 for part in dims.split(",")]
    if dims and (0 in numbers or numbers != sorted(set(numbers), reverse=True)):
        raise UsageError(
            f"--matryoshka_dims {dims}: must be numbers of at least 1, the largest first, such as 384,256,128,64"
        )


def _resumes(arguments) -> bool:
    """Whether the run folder has checkpoints that the command goes on from."""
    has_run = os.path.isdir(os.path.join(arguments.output_dir, "checkpoints"))
    return has_run and arguments.resume_from_checkpoint != "none"


LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
                 "inverse_sqrt")  # fmt: skip
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab")
ENDLESS_SCHEDULERS = ("constant", "constant_with_warmup", "inverse_sqrt")


# Flags that may change when a run is resumed: they decide when it ends, what is validated, kept and shown. Flags of
# data and batches are not compared, but data and batches are (see `Checkpoints.fingerprint`).
MAY_CHANGE = frozenset(
    """
    output_dir cache_dir num_train_epochs max_train_steps stop_time_hours stop_min_lr patience eval_steps
    eval_after_steps checkpointing_steps checkpoints_total_limit metric_for_best
    load_best_model_at_end
    resume_from_checkpoint allow_reshard init_from reset_optimizer reset_lr_scheduler reset_dataloader reset_meters
    per_device_train_batch_size per_device_eval_batch_size max_tokens gradient_accumulation_steps curriculum_epochs
    group_by_document gradient_cache_tokens dataloader_num_workers mixed_precision max_skipped_steps nan_detector
    min_loss_scale check_weight_norm log_steps log_format report_to profile top_k retriever drafts_file
    validation_drafts_file ranking bm25_weight smooth_window smooth_decay hop_weight truncate_dim reranker
    rerank_top_k rerank_weight index trec_run gradient_checkpointing torch_compile trust_remote_code merge_lora
    push_to_hub hub_model_id hub_private_repo
    """.split()
)


@dataclass
class ReadingArguments:
    """How files of examples are read."""

    documents_file: str | None = flag(None, "documents by `doc_id`, for examples that only name their document")
    dataset_config_name: str | None = flag(None, "configuration name of a Hub data set")
    id_column: str = flag("id", "field with the example's id (default if absent: the row number)")
    query_column: str = flag("query", "field with the question (may be absent)")
    document_column: str = flag("document", "field with the document as one text")
    passages_column: str = flag("passages", "field with the passages: strings, turns of speaker and text, or messages")
    summary_column: str = flag("summary", "field with the reference summary, or a list of references")
    evidence_column: str = flag(
        "evidence", "field with the numbers of the gold passages, from 0; with a corpus, their ids"
    )
    passage_words: int = flag(
        100,
        "maximum words (in Chinese, Thai and the like: characters) of a passage that is split off or merged",
        at_least=1,
    )
    merge_passages: bool = flag(False, "merge consecutive passages into chunks of up to --passage_words words")
    skip_bad_examples: bool = flag(False, "skip unusable examples and list them in rejected.jsonl")

    def refuse_reading(self, why: str, *, where) -> None:
        """Raises UsageError for a flag of reading files `where` no file of examples is read."""
        others = ("passage_words", "skip_bad_examples")  # of texts and corpora too
        names = (field.name for field in dataclasses.fields(ReadingArguments) if field.name not in others)
        refuse(self, names, why, where=where)

    def reading_options(self) -> dict:
        """These flags, less the documents file, as keywords of `load_examples`."""
        names = (field.name for field in dataclasses.fields(ReadingArguments) if field.name != "documents_file")
        return {name: getattr(self, name) for name in names}


@dataclass
class DataArguments(ReadingArguments):
    """What is trained on and validated with."""

    corpus_file = train_qrels_file = validation_qrels_file = test_qrels_file = None  # flags of `CorpusArguments` only

    train_file: str | None = flag(
        None,
        "training examples: JSON Lines (also .xz, .gz), JSON, CSV, Parquet, a folder or a Hub name, "
        "in a layout that README.md lists (default: the embedded data set)",
    )
    validation_file: str | None = flag(None, "validation examples, in any of the same forms")
    validation_documents_file: str | None = flag(
        None, "--documents_file of the validation examples (default: --documents_file)"
    )
    test_file: str | None = flag(None, "test examples, in any of the same forms; scored once, with the final model")
    test_documents_file: str | None = flag(None, "--documents_file of the test examples (default: --documents_file)")
    max_train_examples: int | None = flag(None, "use only the first N training examples (debugging)", at_least=1)
    max_eval_examples: int | None = flag(None, "use only the first N validation examples (debugging)", at_least=1)
    max_test_examples: int | None = flag(None, "use only the first N test examples (debugging)", at_least=1)
    sample_documents: int = flag(
        1500, "size of the embedded training set in transcripts, with six examples each", at_least=1
    )

    def check_data(self) -> None:
        """Raises UsageError for a flag of other data than what is trained on."""
        refuse(self, ("sample_documents",), "with --train_file", where=self.train_file)
        self.refuse_reading("without --train_file", where=not self.train_file)
        refuse(self, ("passage_words",), "without --train_file", where=not self.train_file)


@dataclass
class SearchArguments(ReadingArguments):
    """What is searched: the passages of the examples, or one corpus."""

    corpus_file: str | None = flag(
        None, "a corpus that all examples search, as records of `_id`, `title`, `text` (BEIR)"
    )
    index: str = flag("flat", "search of a corpus: exact, or two faster ones", choices=("flat", "ivf", "hnsw"))


@dataclass
class CorpusArguments(SearchArguments, DataArguments):
    """One corpus that all examples search, with their evidence."""

    train_qrels_file: str | None = flag(
        None, "evidence of the training queries in the corpus, in BEIR's or TREC's format"
    )
    validation_qrels_file: str | None = flag(None, "evidence of the validation queries in the corpus")
    test_qrels_file: str | None = flag(None, "evidence of the test queries in the corpus")


@dataclass
class RunArguments:
    """Where a run is kept and how it computes."""

    output_dir: str = flag("outputs", "the run folder")
    mixed_precision: str | None = flag(
        None,
        "autocast (default: accelerate's setting; else bf16 for pretrained models if the hardware supports it)",
        choices=("no", "bf16", "fp16"),
    )
    cache_dir: str | None = flag(
        None, "folder for what is made of the data (default: multistep-retrieve-summarize in $HF_HOME)"
    )
    deterministic: bool = flag(False, "use only deterministic operations")
    trust_remote_code: bool = flag(False, "run the Python code that a model of the Hub or a folder brings with it")
    seed: int = flag(42, "random seed of data order, dropout and new weights", at_least=0, at_most=2**32 - 1)
    language: str | None = flag(
        None,
        "language of the texts, for BM25: a code or name such as de or german; none: no stemmer and no stop words "
        "(default: the retriever's, else en)",
    )

    def __post_init__(self):
        check_values(self)
        if self.language is not None:
            from utils.data.words import language_name  # takes a moment

            language_name(self.language)  # raises UsageError for an unknown one


RANKINGS = ("dense", "hybrid")


@dataclass
class RankingArguments:
    """How a retriever that is trained here ranks."""

    ranking: str = flag("dense", "the retriever's scores, or BM25's added to them", choices=RANKINGS)
    bm25_weight: float = flag(0.5, "weight of BM25's score with --ranking hybrid (the retriever's: 1)", at_least=0)
    smooth_window: int = flag(0, "neighbours per side that share in a passage's score; 0: off", at_least=0)
    smooth_decay: float = flag(0.5, "decay of the shared score per passage; squared backward", at_least=0)
    hop_weight: float = flag(0.5, "share of a later hop in the fused scores, if it agrees", at_least=0, at_most=1)


@dataclass
class RankingOverrides:
    """How a trained retriever ranks: None is what it was trained with, else the default of `RankingArguments`."""

    ranking: str | None = flag(
        None, "dense, or hybrid with BM25 (default: the retriever's setting, else dense)", choices=RANKINGS
    )
    bm25_weight: float | None = flag(
        None, "weight of BM25's score with --ranking hybrid (default: the retriever's, else 0.5)", at_least=0
    )
    smooth_window: int | None = flag(
        None, "neighbours that share in a passage's score; 0: off (default: the retriever's, else 0)", at_least=0
    )
    smooth_decay: float | None = flag(
        None, "decay of the shared score per passage (default: the retriever's, else 0.5)", at_least=0
    )
    truncate_dim: int | None = flag(
        None, "search with embeddings cut to so many dimensions (default: the retriever's setting)", at_least=1
    )

    def ranking_settings(self, saved: dict | None) -> dict:
        """How to rank: explicit flags, else what was `saved` with the retriever, else the defaults.

        `saved` is None if no trained retriever searches. Raises UsageError for a flag that has no effect.
        """
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(RankingOverrides)}
        given = {setting: value for setting, value in given.items() if value is not None}
        settings = dataclasses.asdict(RankingArguments()) | (saved or {}) | given
        if given and saved is None:
            raise UsageError(f"--{next(iter(given))} needs a --retriever that is a trained model; leave the flag out")
        if "bm25_weight" in given and settings["ranking"] != "hybrid":
            raise UsageError("--bm25_weight has no effect without --ranking hybrid")
        if "smooth_decay" in given and not settings["smooth_window"]:
            raise UsageError("--smooth_decay has no effect without --smooth_window")
        if (hop_weight := getattr(self, "hop_weight", None)) is not None:
            settings["hop_weight"] = hop_weight
        if saved == {} and settings["ranking"] == "hybrid":  # a retriever from elsewhere, which has no language of ours
            settings["language"] = getattr(self, "language", None)
        return settings


@dataclass
class RerankerArguments:
    """A reranker that looks again at the best passages. What is not set is what it was trained with."""

    reranker: str | None = flag(None, "what reranks the best passages: a folder of train_rerank.py, or a Hub name")
    rerank_top_k: int | None = flag(
        None, "best passages that are reranked (default: the reranker's setting, else 50)", at_least=2
    )
    rerank_weight: float | None = flag(
        None, "weight of the reranker's score; the search's is 1 (default: the reranker's, else 1)", at_least=0
    )

    def rerank_settings(self, saved: dict) -> dict:
        """How to rerank: explicit flags, else what was `saved` with the reranker, else the defaults.

        Raises UsageError for a flag that has no effect.
        """
        settings = {}
        for name, default in (("rerank_top_k", 50), ("rerank_weight", 1.0)):
            given = getattr(self, name)
            if given is not None and not self.reranker:
                raise UsageError(f"--{name} has no effect without --reranker")
            settings[name] = saved.get(name, default) if given is None else given
        return settings


@dataclass
class GenerationArguments:
    """How a summarizer writes. What is not set is the model's own, else that of `generation.DEFAULTS`."""

    num_beams: int | None = flag(
        None, "beams in generation; 1 is greedy (default: the model's setting, else 4)", at_least=1
    )
    length_penalty: float | None = flag(
        None, "beam scores are divided by length to this power (default: the model's setting, else 1)"
    )
    min_new_tokens: int | None = flag(
        None, "minimum tokens to generate (default: the model's setting, else 0)", at_least=0
    )
    max_new_tokens: int | None = flag(
        None, "maximum tokens to generate (default: the model's setting, else 128)", at_least=1
    )
    no_repeat_ngram_size: int | None = flag(
        None, "generate no n-gram of this size twice; 0: off (default: the model's setting, else 0)", at_least=0
    )

    def generation(self) -> dict:
        """These flags, None where they are not set."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(GenerationArguments)}


@dataclass
class LanguageArguments(GenerationArguments):
    """How a summarizer reads and writes."""

    prompt_template: str | None = flag(
        None, "file with a language model's prompt, {query} and {passages} in it (default: that of its training)"
    )
    source_prefix: str | None = flag(None, 'text before every source, as T5 needs it: "summarize: "')
    source_lang: str | None = flag(None, "language of the sources, for tokenizers with languages, such as en_XX")
    target_lang: str | None = flag(None, "language of the summaries, likewise")

    def __post_init__(self):
        super().__post_init__()
        if path := self.prompt_template:  # from here on, it is the text
            try:
                self.prompt_template = Path(path).read_text(encoding="utf-8").strip("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"--prompt_template {path}: cannot be read: {error}") from error
            lines = self.prompt_template.split("\n")
            of_queries = [line for line in lines if "{query}" in line]
            of_passages = [line for line in lines if "{passages}" in line]
            if not of_queries or self.prompt_template.count("{passages}") != 1 or of_passages[0] in of_queries:
                raise UsageError(
                    f"--prompt_template {path}: must have {{passages}} once, and {{query}} in other lines, "
                    "which are left out for an example without a query"
                )


@dataclass
class LoraArguments(RunArguments):
    """Adapters that are trained in place of a pretrained model's weights (LoRA)."""

    lora_rank: int = flag(0, "LoRA: train adapters of this rank, and no other weight; 0: train all weights", at_least=0)
    lora_alpha: int | None = flag(None, "adapters are scaled by this over --lora_rank (default: 2 x rank)", at_least=1)
    lora_dropout: float = flag(0.0, "dropout of what the adapters read", at_least=0, below=1)
    lora_target_modules: str = flag(
        "all-linear", "layers with an adapter: how their names end, as in q_proj,v_proj; or all but the output layer"
    )
    merge_lora: bool = flag(False, "add the adapters to the weights of the model that is written")

    def __post_init__(self):
        super().__post_init__()
        of_adapters = ("lora_alpha", "lora_dropout", "lora_target_modules", "merge_lora")
        refuse(self, of_adapters, "without --lora_rank", where=not self.lora_rank)
        if self.lora_rank and not self.model_name_or_path:  # a flag of the scripts
            raise UsageError("--lora_rank needs a pretrained model: set --model_name_or_path")


@dataclass
class TrainingArguments(LoraArguments):
    """How a model is trained."""

    num_train_epochs: int = flag(3, "epochs to train; 0: no limit", at_least=0)
    max_train_steps: int = flag(0, "optimizer steps to train; 0: no limit", at_least=0)
    stop_time_hours: float = flag(
        0.0, "stop after this many hours of training, summed over resumed runs; 0: no limit", at_least=0
    )
    stop_min_lr: float = flag(-1.0, "stop when the learning rate has fallen to this value; -1: never")
    patience: int = flag(-1, "stop after this many validations without improvement; -1: never")

    eval_steps: int = flag(0, "optimizer steps between validations; 0: validate after each epoch", at_least=0)
    eval_after_steps: int = flag(0, "optimizer steps before the first validation", at_least=0)
    checkpointing_steps: int = flag(0, "optimizer steps between checkpoints; 0: save after each epoch", at_least=0)
    checkpoints_total_limit: int = flag(3, "checkpoints to keep, besides the best one; 0: all", at_least=0)
    metric_for_best: str = flag("loss", "validation score that selects the best checkpoint")
    greater_is_better: bool | None = flag(
        None, "whether a higher --metric_for_best is better (default: unless it is loss, nll_loss or ppl)"
    )
    load_best_model_at_end: bool = flag(False, "use the best checkpoint as the final model, instead of the last one")
    resume_from_checkpoint: str = flag(
        "auto",
        "auto: the newest valid checkpoint in the run folder, if any; none: delete them and start again; "
        "or the folder of a checkpoint",
    )
    allow_reshard: bool = flag(False, "resume with another number of processes or another batch size")
    init_from: str | None = flag(
        None, "start from the weights and state of another run (its folder, or one of its checkpoints)"
    )
    reset_optimizer: bool = flag(False, "with --init_from: do not take the optimizer's state")
    reset_lr_scheduler: bool = flag(False, "with --init_from: restart the learning rate schedule")
    reset_dataloader: bool = flag(False, "with --init_from: count epochs and steps from 0")
    reset_meters: bool = flag(False, "with --init_from: forget the best score, patience and training time")

    per_device_train_batch_size: int = flag(16, "examples per device and micro-batch", at_least=1)
    per_device_eval_batch_size: int = flag(32, "examples per device and batch in validation", at_least=1)
    max_tokens: int = flag(
        0,
        "tokens per device and micro-batch, padding included, instead of a number of examples; 0: off",
        at_least=0,
    )
    gradient_accumulation_steps: str = flag(
        "1", "micro-batches per optimizer step; a list such as 4,2,1 gives one number per epoch"
    )
    gradient_checkpointing: bool = flag(
        False, "compute layers again in the backward pass instead of keeping their results: less memory, more time"
    )
    curriculum_epochs: int = flag(
        0, "number of first epochs that run from short to long examples, unshuffled", at_least=0
    )
    dataloader_num_workers: int = flag(0, "worker processes per training process that prepare batches", at_least=0)

    learning_rate: float = flag(1e-3, "peak learning rate", at_least=0)
    torch_compile: bool = flag(False, "compile the layers of the model (torch.compile) for training on a GPU")
    lr_scheduler_type: str = flag("linear", "learning rate schedule", choices=LR_SCHEDULERS)
    num_warmup_steps: int = flag(100, "optimizer steps of linear warm-up, at most a tenth of all steps", at_least=0)
    weight_decay: float = flag(0.01, "AdamW weight decay, not applied to biases and norms", at_least=0)
    adam_beta1: float = flag(0.9, "AdamW beta1", at_least=0, below=1)
    adam_beta2: float = flag(0.98, "AdamW beta2", at_least=0, below=1)
    adam_epsilon: float = flag(1e-8, "AdamW epsilon", at_least=0)
    max_grad_norm: float = flag(1.0, "clip the gradient norm to this; 0: off", at_least=0)

    max_skipped_steps: int = flag(
        20, "end the run after more than this many dropped steps in a row (not finite, or out of memory)", at_least=0
    )
    nan_detector: bool = flag(True, "when a step is not finite, name the first module whose output is not")
    min_loss_scale: float = flag(1e-4, "end the run if the fp16 loss scale falls below this")
    check_weight_norm: bool = flag(True, "end the run if the weights differ between processes")

    log_steps: int = flag(100, "optimizer steps between log lines", at_least=1)
    log_format: str | None = flag(
        None,
        "format of log lines (default: tqdm on a terminal, else simple)",
        choices=("tqdm", "simple", "json", "none"),
    )
    report_to: str | None = flag(None, "experiment tracker (default: none)", choices=TRACKERS)
    profile: bool = flag(False, "write a profiler trace of a few steps to the run folder")
    overfit_one_batch: bool = flag(False, "train on the examples of the first step only (debugging)")

    push_to_hub: bool = flag(False, "publish the model and its card on the Hugging Face Hub when the run is done")
    hub_model_id: str | None = flag(None, "name there, such as anna/retriever (default: that of the run folder)")
    hub_private_repo: bool | None = flag(None, "whether only its owners see it (default: as the Hub sets it for them)")

    def __post_init__(self):
        super().__post_init__()
        rules = (self.num_train_epochs, self.max_train_steps, self.stop_time_hours, self.patience >= 0,
                 self.stop_min_lr >= 0)  # fmt: skip
        if not any(rules):
            raise UsageError("training would never end: set --num_train_epochs, --max_train_steps or another limit")
        if not any(rules[:2]) and self.lr_scheduler_type not in ENDLESS_SCHEDULERS:
            raise UsageError(
                f"--lr_scheduler_type {self.lr_scheduler_type} needs --num_train_epochs or --max_train_steps; "
                f"without them choose one of {', '.join(ENDLESS_SCHEDULERS)}"
            )
        refuse(self, ("hub_model_id", "hub_private_repo"), "without --push_to_hub", where=not self.push_to_hub)
        resets = ("reset_optimizer", "reset_lr_scheduler", "reset_dataloader", "reset_meters")
        refuse(self, resets, "without --init_from", where=not self.init_from)
        if isinstance(self, DataArguments):  # as in all scripts
            self.check_data()
        if self.torch_compile and self.gradient_checkpointing:
            raise UsageError("--torch_compile has no effect with --gradient_checkpointing; leave one of them out")
        if self.lr_scheduler_type == "polynomial" and self.learning_rate <= 1e-7:
            raise UsageError(
                f"--learning_rate {self.learning_rate}: must be greater than 1e-7, where polynomial decay ends"
            )
        if not all(part.isdecimal() and int(part) for part in self.gradient_accumulation_steps.split(",")):
            raise UsageError(
                f"--gradient_accumulation_steps {self.gradient_accumulation_steps}: "
                "must be a number of at least 1, or a list such as 4,2,1"
            )

    def decisive(self) -> dict:
        """The flags that decide what a step computes, beside data and batches. To resume, they must be the same."""
        others = {field.name for owner in (CorpusArguments, GenerationArguments) for field in dataclasses.fields(owner)}
        return {name: value for name, value in vars(self).items() if name not in MAY_CHANGE | others}

    def schedule_ends(self) -> bool:
        """Whether the learning rate falls to 0, or nearly, at the end of its schedule."""
        return self.learning_rate > 0 and self.lr_scheduler_type not in ENDLESS_SCHEDULERS

    def judged_by(self) -> list:
        """What the score of a validation depends on, beside the metric and the weights."""
        names = """validation_file validation_documents_file validation_qrels_file max_eval_examples ranking
                   bm25_weight smooth_window smooth_decay truncate_dim index reranker rerank_top_k
                   rerank_weight""".split()
        names += [field.name for field in dataclasses.fields(GenerationArguments)]
        return [getattr(self, name, None) for name in names]

    def accumulation(self, epoch: int) -> int:
        """Micro-batches in a step of this epoch. The last number of a list holds for all later epochs."""
        each = [int(part) for part in self.gradient_accumulation_steps.split(",")]
        return each[min(epoch, len(each) - 1)]


# The groups of --help. The first holds the flags that most runs set. A flag that is in none is listed at the end.
GROUPS = {
    "most used": """
        train_file validation_file input_file document query retriever summarizer model_name_or_path output_dir
        num_train_epochs learning_rate per_device_train_batch_size num_hard_negatives fusion num_hops top_k
        max_source_length num_beams max_new_tokens seed
    """,
    "data": """
        test_file documents_file validation_documents_file test_documents_file corpus_file qrels_file train_qrels_file
        validation_qrels_file test_qrels_file split dataset_config_name id_column query_column document_column
        passages_column summary_column evidence_column passage_words merge_passages skip_bad_examples max_examples
        max_train_examples max_eval_examples max_test_examples sample_documents cache_dir
    """,
    "positives and negatives": """
        num_positives negatives_pool mine_negatives_every negatives_margin group_by_document supervision oracle_passages
        teacher teacher_candidates teacher_temperature guide
    """,
    "drafts and hops": "draft_share drafts_file validation_drafts_file found_weight drafter draft_words hop_weight",
    "ranking": """
        ranking language bm25_weight smooth_window smooth_decay truncate_dim index trec_run reranker rerank_top_k
        rerank_weight
    """,
    "model, loss and generation": """
        max_seq_length query_prompt passage_prompt dropout attention_dropout loss temperature matryoshka_dims
        gradient_cache_tokens
        passage_order prompt_template source_prefix source_lang target_lang max_target_length label_smoothing_factor
        length_penalty min_new_tokens no_repeat_ngram_size trust_remote_code
    """,
    "adapters": "lora_rank lora_alpha lora_dropout lora_target_modules merge_lora",
    "batches": """
        gradient_accumulation_steps max_tokens gradient_checkpointing curriculum_epochs per_device_eval_batch_size
        dataloader_num_workers
    """,
    "optimizer": """
        lr_scheduler_type num_warmup_steps weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm mixed_precision
        torch_compile deterministic
    """,
    "when to stop": "max_train_steps stop_time_hours stop_min_lr patience",
    "validation and checkpoints": """
        eval_steps eval_after_steps metric_for_best greater_is_better load_best_model_at_end checkpointing_steps
        checkpoints_total_limit
    """,
    "resuming and fine-tuning": """
        resume_from_checkpoint allow_reshard init_from reset_optimizer reset_lr_scheduler reset_dataloader reset_meters
    """,
    "publishing on the Hub": "push_to_hub hub_model_id hub_private_repo",
    "failed steps": "max_skipped_steps nan_detector min_loss_scale check_weight_norm",
    "logging and debugging": "log_steps log_format report_to profile overfit_one_batch json",
}


def parse(arguments_class, description: str):
    """Parses the command line into `arguments_class`. A mistake ends the program with one line and exit code 2."""
    parser = Parser(description=description, usage="%(prog)s [flags]", formatter_class=HelpFormatter)
    kinds = typing.get_type_hints(arguments_class)
    fields = {field.name: field for field in dataclasses.fields(arguments_class)}
    groups = {title: names.split() for title, names in GROUPS.items()}
    groups["other"] = [name for name in fields if name not in itertools.chain(*groups.values())]
    for title, names in groups.items():
        group = parser.add_argument_group(title)
        for name in names:
            if name in fields:
                _add_flag(group, fields[name], kinds[name])
    known, unknown = parser.parse_known_args()
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return arguments_class(**vars(known))
    except UsageError as error:
        parser.error(str(error))


ELSEWHERE = {  # what other training scripts call a flag
    "--lr": "--learning_rate",
    "--epochs": "--num_train_epochs",
    "--num_epochs": "--num_train_epochs",
    "--max_steps": "--max_train_steps",
    "--batch_size": "--per_device_train_batch_size",
    "--train_batch_size": "--per_device_train_batch_size",
    "--eval_batch_size": "--per_device_eval_batch_size",
    "--fp16": "--mixed_precision fp16",
    "--bf16": "--mixed_precision bf16",
    "--model": "--model_name_or_path",
    "--model_name": "--model_name_or_path",
    "--warmup_steps": "--num_warmup_steps",
    "--lr_scheduler": "--lr_scheduler_type",
    "--logging_steps": "--log_steps",
    "--save_steps": "--checkpointing_steps",
    "--save_total_limit": "--checkpoints_total_limit",
    "--grad_clip": "--max_grad_norm",
    "--label_smoothing": "--label_smoothing_factor",
    "--max_predict_samples": "--max_test_examples",
}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help texts in one column of at most 120 characters, beside the flags."""

    def __init__(self, prog: str):
        width = min(shutil.get_terminal_size((120, 24)).columns, 120)
        super().__init__(prog, max_help_position=40, width=width)


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations, whose errors are one line."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        """Prints one line with the flag that was probably meant, and exits with code 2."""
        known = [option for action in self._actions for option in action.option_strings]
        for word in message.partition("unrecognized arguments: ")[2].split():
            typed = word.partition("=")[0]
            meant = [name for name in (ELSEWHERE.get(typed, ""),) if name.partition(" ")[0] in known]
            if near := meant or difflib.get_close_matches(typed, known, n=1):
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
        raise argparse.ArgumentTypeError(f"must be true or false, not {word}")
    return word.lower() == "true"
