"""The adapter for mteb against a stand-in of its protocol, and against mteb itself where it is installed."""

import importlib.util
import inspect
from enum import Enum

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from megatron_cocoa.export.mteb_encoder import MtebEncoder
from tests.unit.exported_folders import Folders, write_exported


class PromptType(Enum):
    """As mteb's: members with texts for values."""

    query = "query"
    document = "document"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    return write_exported(tmp_path_factory.mktemp("mteb"))


@pytest.fixture(scope="module")
def encoder(folders) -> MtebEncoder:
    return MtebEncoder.from_pretrained(folders.exported, prompts={"query": "find: "})


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (56, 70, 3), dtype=np.uint8))


def test_batches_are_embedded_in_order_with_their_prompts(encoder):
    """Claim: what mteb's loader yields gives the embedder's own vectors; prompts go to their side alone."""
    texts = [f"text {i}" for i in range(5)]
    loader = DataLoader([{"text": text} for text in texts], batch_size=2)
    plain = encoder.embedder.encode
    # Packs of other lengths: rounding of about 1e-6.
    found = encoder.encode(loader, task_metadata=None, hf_split="test", hf_subset="x", prompt_type=PromptType.query)
    assert found == pytest.approx(plain([f"find: {text}" for text in texts]), abs=1e-5)
    found = encoder.encode(loader, prompt_type=PromptType.document, show_progress_bar=False)
    assert found == pytest.approx(plain(texts), abs=1e-5)
    both = [{"text": ["a", "b"], "image": [picture(0), picture(1)]}, {"image": [picture(2)]}]
    wanted = plain([{"text": "a", "image": picture(0)}, {"text": "b", "image": picture(1)}, picture(2)])
    assert encoder.encode(both) == pytest.approx(wanted, abs=1e-5)
    assert encoder.encode([]).shape == (0, encoder.embedder.hidden_size)
    with pytest.warns(UserWarning, match=r"1 empty text\(s\) of 2"):
        assert np.isfinite(encoder.encode([{"text": ["", "a"]}])).all()


def test_what_cannot_be_embedded_is_refused(encoder, folders):
    """Claim: sound and video are not passed over in silence; neither are prompts for a side that does not exist."""
    with pytest.raises(ValueError, match="holds text, audio"):
        encoder.encode([{"text": ["a"], "audio": [None]}])
    with pytest.raises(ValueError, match="holds nothing"):
        encoder.encode([{}])
    with pytest.raises(ValueError, match="as many texts as pictures"):
        encoder.encode([{"text": ["a"], "image": [picture(0), picture(1)]}])
    with pytest.raises(ValueError, match="passage"):
        MtebEncoder(encoder.embedder, prompts={"passage": "x"})


def test_similarities_are_cosines(encoder):
    """Claim: both forms are torch's cosine similarity."""
    a, b = torch.randn(4, 6), torch.randn(4, 6)
    wanted = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)
    # Float32 sums of six products.
    assert torch.allclose(encoder.similarity(a.numpy(), b), wanted, atol=1e-6)
    assert torch.allclose(encoder.similarity_pairwise(a, b), wanted.diagonal(), atol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("mteb") is None, reason="mteb is not installed")
def test_mteb_takes_it(encoder):
    """Claim: mteb's own protocol recognises the adapter, and every argument that it passes is accepted."""
    from mteb.models.models_protocols import EncoderProtocol

    assert isinstance(encoder, EncoderProtocol)
    passed = {n for n, p in inspect.signature(EncoderProtocol.encode).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert passed <= set(inspect.signature(encoder.encode).parameters)
    meta = encoder.mteb_model_meta
    assert meta.name == "local/exported" and meta.embed_dim == 64 and meta.modalities == ["text", "image"]


@pytest.mark.skipif(importlib.util.find_spec("mteb") is None, reason="mteb is not installed")
def test_mteb_runs_a_picture_task(encoder, tmp_path):
    """Claim: mteb scores pairs of pictures with it, and its cosine score is scipy's correlation of our cosines."""
    import mteb
    from datasets import Dataset
    from mteb.abstasks.sts import AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata
    from scipy.stats import spearmanr

    first, second = [picture(i) for i in range(8)], [picture(i // 2) for i in range(8)]
    scores = [float(i % 5) for i in range(8)]

    class Pairs(AbsTaskSTS):
        metadata = TaskMetadata(
            name="LocalPairs",
            description="Pictures in pairs.",
            dataset={"path": "local/pairs", "revision": "1"},
            type="VisualSTS(eng)",
            category="i2i",
            modalities=["image"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="cosine_spearman",
        )
        column_names = ("image1", "image2")
        min_score, max_score = 0, 4

        def load_data(self, **kwargs):
            columns = {"image1": first, "image2": second, "score": scores}
            self.dataset = {"test": Dataset.from_dict(columns)}
            self.data_loaded = True

    found = mteb.evaluate(encoder, Pairs(), cache=None, show_progress_bar=False, co2_tracker=False)
    cosines = encoder.similarity_pairwise(encoder.encode([{"image": first}]), encoder.encode([{"image": second}]))
    wanted = spearmanr(cosines.numpy(), scores).statistic
    # A correlation of ranks: equal but for ties that rounding may break.
    assert found.task_results[0].scores["test"][0]["main_score"] == pytest.approx(wanted, abs=0.05)


@pytest.mark.skipif(importlib.util.find_spec("mteb") is None, reason="mteb is not installed")
@pytest.mark.parametrize("category", ["t2i", "i2t", "it2it"])
def test_mteb_runs_a_retrieval_task(encoder, category):
    """Claim: mteb's retrieval between captions and pictures, and of both together, scores our own cosines: its
    nDCG is that of the order in which the embedder puts the candidates, and prompts reach the queries alone."""
    import mteb
    from datasets import Dataset
    from datasets import Image as ImageFeature
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    captions = [f"picture number {i} of twelve" for i in range(12)]
    pictures = [picture(i) for i in range(12)]
    columns = {"t": {"text": captions}, "i": {"image": pictures}, "it": {"text": captions, "image": pictures}}
    asked, offered = (columns[side] for side in category.split("2"))

    def side(kind: str, found: dict) -> Dataset:
        made = Dataset.from_dict({"id": [f"{kind}{i}" for i in range(12)], **found})
        return made.cast_column("image", ImageFeature()) if "image" in found else made

    class Local(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=f"Local{category.upper()}",
            description="Captions and pictures.",
            dataset={"path": "local/retrieval", "revision": "1"},
            type="Any2AnyRetrieval",
            category=category,
            modalities=["text", "image"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, **kwargs):
            split = {
                "corpus": side("c", offered),
                "queries": side("q", asked),
                "relevant_docs": {f"q{i}": {f"c{i}": 1} for i in range(12)},
                "top_ranked": None,
            }
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    found = mteb.evaluate(encoder, Local(), cache=None, show_progress_bar=False, co2_tracker=False)
    queries = [dict(zip(asked, values)) for values in zip(*asked.values())]
    candidates = [dict(zip(offered, values)) for values in zip(*offered.values())]
    prompt = encoder.prompts["query"]
    vectors = encoder.embedder.encode(queries, instruction=prompt), encoder.embedder.encode(candidates)
    cosines = vectors[0] @ vectors[1].T
    ranks = 1 + (cosines > np.diagonal(cosines)[:, None]).sum(axis=1)
    # One right candidate a query: the gain is that of its rank alone.
    wanted = float(np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0.0).mean())
    # mteb rounds to five places.
    assert found.task_results[0].scores["test"][0]["ndcg_at_10"] == pytest.approx(wanted, abs=2e-5)
    assert wanted < 1 or category == "it2it", "random weights: captions and pictures do not find each other"
