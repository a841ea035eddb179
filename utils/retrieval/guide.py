"""A guide: a frozen retriever that tells which passages are no negatives.

GISTEmbed: Solatorio, 2024, arXiv:2402.16829. Each question and passage is encoded once, before training, into files of
the cache. Questions are encoded alone, also where the retriever that is trained searches with a draft.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from utils.files import digest
from utils.models.encoder import encode, load_retriever, tokens_key, weights_key
from utils.models.settings import settle_packing
from utils.progress import Phase
from utils.tables import cached

ENCODED_AT_ONCE = 2**14  # texts


class Guide:
    """A guide's embeddings of questions and passages, which are mapped into memory; UsageError if it cannot be loaded.

    Args:
        name_or_path: of the model; it embeds with its own prompts.
        questions: of the examples.
        accelerator: embeddings are computed on its device and in its precision, by one process for all others.
    """

    def __init__(self, name_or_path: str, questions: Iterable[str], *, accelerator, trust_remote_code: bool = False):
        self.model, self.accelerator = load_retriever(name_or_path, trust_remote_code=trust_remote_code), accelerator
        settle_packing(self.model, accelerator, self.model.max_seq_length)
        self.key = digest([weights_key(self.model), tokens_key(self.model), accelerator.mixed_precision])
        questions = list(questions)
        self.questions = self._embed(questions, "query")
        self.is_asked = np.array([bool(question.strip()) for question in questions])
        self.keys = np.empty(0, np.int64)  # of the passages that were read, sorted
        self.places = np.empty(0, np.int64)  # where the vector of each of them is, among those of all `passages`
        self.passages: list[np.ndarray] = []

    def _embed(self, texts: list[str], kind: str) -> np.ndarray:
        """(texts, hidden), from the cache if it is there."""

        def write(folder: Path) -> None:
            shape = (len(texts), self.model.get_embedding_dimension())
            vectors = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, shape)
            self.model.to(self.accelerator.device)
            with Phase("encoded", "queries" if kind == "query" else "passages", len(texts)):
                for first in range(0, len(texts), ENCODED_AT_ONCE):
                    some = texts[first : first + ENCODED_AT_ONCE]
                    vectors[first : first + len(some)] = encode(self.model, some, kind, accelerator=self.accelerator,
                                                                alone=True)  # fmt: skip
            vectors.flush()
            self.model.to("cpu")

        folder = cached("guide", [self.key, kind, digest(texts)], write)
        return np.load(folder / "vectors.npy", mmap_mode="r")

    def read(self, keys: Iterable[int], texts: Iterable[str]) -> None:
        """Embeds the passages among these that were not read before; those with the same key have the same text."""
        known = set(self.keys.tolist())
        new = sorted({key: text for key, text in zip(keys, texts, strict=True) if key not in known}.items())
        if not new:
            return
        first = sum(map(len, self.passages))
        self.passages.append(self._embed([text for _, text in new], "passage"))
        keys = np.concatenate([self.keys, [key for key, _ in new]]).astype(np.int64)
        places, order = np.concatenate([self.places, first + np.arange(len(new))]), keys.argsort()
        self.keys, self.places = keys[order], places[order]

    def _passages(self, keys: np.ndarray) -> np.ndarray:
        """(keys, hidden), zeros for the negative keys of padding."""
        found = np.zeros((len(keys), self.questions.shape[1]), np.float32)
        places = self.places[np.searchsorted(self.keys, np.maximum(keys, self.keys[0]))]
        first = 0
        for vectors in self.passages:
            here = (keys >= 0) & (places >= first) & (places < first + len(vectors))
            found[here] = vectors[places[here] - first]
            first += len(vectors)
        return found

    def excluded(self, examples: np.ndarray, evidence_keys: torch.Tensor, passage_keys: torch.Tensor) -> torch.Tensor:
        """(questions, passages) bool: passages that are no less similar to a question than all of its evidence is.

        Args:
            examples: (questions,) their numbers. A question that is empty excludes no passage.
            evidence_keys: (questions, most evidence), padded with -1. Its most similar evidence counts.
            passage_keys: (passages,), padded with -2.
        """
        questions, evidence = self.questions[examples], evidence_keys.numpy()
        of_evidence = self._passages(evidence.ravel()).reshape(*evidence.shape, -1)
        of_evidence = np.einsum("qd,qed->qe", questions, of_evidence)
        best = np.where(evidence >= 0, of_evidence, -np.inf).max(1, keepdims=True)
        # the evidence itself is as similar; a matrix product rounds it otherwise
        similar = questions @ self._passages(passage_keys.numpy()).T >= best - 1e-6
        return torch.from_numpy(similar & self.is_asked[examples][:, None])
