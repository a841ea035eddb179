"""Approximate indexes: built once, mapped into memory, rebuilt when damaged or out of date."""

import faiss
from retrieval_cases import PASSAGES, Encoder, encode_all

from utils.retrieval import faiss_index
from utils.retrieval.exact_search import dense_search
from utils.retrieval.faiss_index import approximate_index


def test_approximate_index_is_built_once_and_mapped_and_anew_for_other_vectors_or_where_it_is_damaged(
    tmp_path, monkeypatch
):
    builds, build = [], faiss_index._build
    monkeypatch.setattr(faiss_index, "_build", lambda *args: builds.append(1) or build(*args))
    vectors = encode_all(PASSAGES, Encoder(), tmp_path / "v")
    queries = Encoder()(["one"])
    for kind in ("ivf", "hnsw"):
        expected = dense_search(queries, vectors, 5)
        for damage in (None, None, b"half", "json"):
            if damage == "json":
                (tmp_path / "v" / f"{kind}.json").unlink()
            elif damage:
                (tmp_path / "v" / f"{kind}.faiss").write_bytes(damage)
            assert [p for p, _ in dense_search(queries, vectors, 5, index=kind)[0]] == [p for p, _ in expected[0]]
        assert len(builds) == 3
        builds.clear()
    mapped = approximate_index(vectors, "ivf")
    assert isinstance(faiss.downcast_InvertedLists(mapped.invlists), faiss.OnDiskInvertedLists)
    others = encode_all(PASSAGES[:50], Encoder(), tmp_path / "v", "other")
    assert not (tmp_path / "v" / "ivf.faiss").exists()
    assert len(dense_search(queries, others, 60, index="ivf")[0]) == 50
