# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.word_vectors`: word2vec on a real text, ours and gensim's: how fast, and how good.

The Lee corpus, repeated until a million words have passed, with the same settings and several seeds. Writes
word-vectors.json beside the other results, and the table in docs/tokens.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from itertools import combinations, product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine, report
from benchmarks.runner import RESULTS, dump
from sslkernels import text, words
from sslkernels.evaluation import context_accuracy, word_analogies, word_similarity
from sslkernels.methods import Word2Vec

PASSES, DIM, MIN_COUNT = 20, 100, 5
SIMILAR = 1000  # of the most frequent words, whose similarities are compared between two trainings
GENSIM, OURS, HOGWILD = "gensim, 2 workers", "`Word2Vec.fit`", "`Word2Vec.fit(hogwild=True)`"


class Vectors(NamedTuple):
    inputs: Tensor
    outputs: Tensor
    seconds: float


def of_gensim(sentences: list[list[str]], vocabulary: text.Vocabulary, seed: int) -> Vectors:
    from gensim.models import Word2Vec as Gensim

    model = Gensim(sg=1, hs=0, negative=5, vector_size=DIM, window=5, sample=1e-3, min_count=1, workers=2, seed=seed)
    model.build_vocab([[word for word in sentence if word in vocabulary] for sentence in sentences])
    started = time.perf_counter()
    model.train(sentences, total_examples=len(sentences), epochs=PASSES)
    seconds = time.perf_counter() - started
    order = torch.tensor([model.wv.key_to_index[word] for word in vocabulary.words])
    return Vectors(torch.from_numpy(model.wv.vectors)[order], torch.from_numpy(model.syn1neg)[order], seconds)


def of_ours(sentences: list[list[str]], vocabulary: text.Vocabulary, seed: int, *, hogwild: bool = False) -> Vectors:
    torch.manual_seed(seed)
    ids = [vocabulary.encode(sentence) for sentence in sentences]
    method = Word2Vec(vocabulary.counts, dim=DIM)
    with torch.no_grad():
        method.input_weight *= 2  # gensim 4 starts from twice the original's range, which a short training still shows
    started = time.perf_counter()
    method.fit(ids, epochs=PASSES, hogwild=hogwild)
    return Vectors(method.input_weight.detach(), method.output_weight.detach(), time.perf_counter() - started)


CONTENDERS: dict[str, Callable[..., Vectors]] = {
    GENSIM: of_gensim,
    OURS: of_ours,
    HOGWILD: lambda *arguments: of_ours(*arguments, hogwild=True),
}


def agreement(a: Tensor, b: Tensor) -> float:
    """Correlation of the cosines between the most frequent words, of one training with another's."""
    upper = torch.triu_indices(SIMILAR, SIMILAR, 1)
    cosines = [(unit @ unit.T)[upper[0], upper[1]] for unit in (F.normalize(x[:SIMILAR], dim=1) for x in (a, b))]
    return float(torch.corrcoef(torch.stack(cosines))[0, 1])


def measure(seeds: int) -> dict[str, Any]:
    """Every contender with every seed, one after the other: on all of the corpus, and on its training part."""
    corpus = [text.words(sentence) for document in text.lee_background() for sentence in document]
    vocabulary = text.Vocabulary(corpus, min_count=MIN_COUNT)
    parts = [[text.words(s) for document in part for s in document] for part in text.split(text.lee_background())]
    data = words.word_pairs(min_count=MIN_COUNT)
    count = sum(map(len, corpus))
    trained: dict[str, list[Vectors]] = {name: [] for name in CONTENDERS}
    scores: dict[str, dict[str, list[float]]] = {
        name: {how: [] for how in ("words_per_second", "simlex", "analogies", "contexts")} for name in CONTENDERS
    }
    for seed, (name, train) in product(range(seeds), CONTENDERS.items()):
        vectors = train(corpus, vocabulary, seed)
        trained[name].append(vectors)
        simlex = word_similarity(vectors.inputs, vocabulary.index)
        analogies = word_analogies(vectors.inputs, vocabulary.index)
        half = train(parts[0], data.vocabulary, seed)
        found = scores[name]
        found["words_per_second"].append(PASSES * count / vectors.seconds)
        found["simlex"].append(simlex.score)
        found["analogies"].append(analogies.score)
        found["contexts"].append(context_accuracy(half.inputs, half.outputs, data.test_pairs))
        print(f"seed {seed}  {name:<30}", *(f"{how} {values[-1]:.4g}" for how, values in found.items()), flush=True)
    for name, vectors in trained.items():  # with gensim's of other seeds; gensim's with each other
        theirs = trained[GENSIM]
        pairs = combinations(theirs, 2) if name == GENSIM else product(vectors, theirs)
        scores[name]["agreement"] = [agreement(a.inputs, b.inputs) for a, b in pairs]
    return {
        "corpus": "Lee background corpus",
        "words": count,
        "passes": PASSES,
        "vocabulary": len(vocabulary),
        "pairs": {"known": simlex.known, "total": simlex.total},
        "questions": {"known": analogies.known, "total": analogies.total},
        "held_out_pairs": len(data.test_pairs),
        "scores": scores,
    }


def spread(values: Sequence[float], digits: int, factor: float = 1.0) -> str:
    x = torch.tensor(values, dtype=torch.float64) * factor
    return f"{x.mean():.{digits}f}" + (f" ± {x.std():.{digits}f}" if len(values) > 1 else "")


def table(results: dict[str, Any]) -> str:
    scores = results["scores"]
    theirs = torch.tensor(scores[GENSIM]["words_per_second"])
    rows = []
    for name, found in scores.items():
        speed = torch.tensor(found["words_per_second"])
        rows.append([
            name, f"{speed.median() / 1e3:,.0f}k", f"{(speed / theirs).median():.2f}x", spread(found["simlex"], 3),
            spread(found["analogies"], 1, 100), spread(found["contexts"], 1, 100),
            spread(found["agreement"], 3) if found["agreement"] else "-",
        ])  # fmt: skip
    header = ["training", "words a second", "to gensim", "SimLex-999", "analogies, %", "held-out contexts, %",
              "agreement with gensim"]  # fmt: skip
    return report.table(header, rows)


def facts(results: dict[str, Any]) -> str:
    pairs, questions, made = results["pairs"], results["questions"], results["provenance"]
    commit = (made["commit"] or "unknown")[:10] + " with uncommitted changes" * made["dirty"]
    seeds = len(results["scores"][OURS]["simlex"])
    return (
        f"{results['machine']['cpu']}, {made['threads']} threads, {made['date']}, commit {commit}; {seeds} seeds, "
        f"mean ± standard deviation over them, all from gensim's start; {results['corpus']}, {results['words']:,} "
        f"words, {results['passes']} times over. {results['vocabulary']:,} words are known: {pairs['known']} of "
        f"SimLex's {pairs['total']} pairs and {questions['known']} of {questions['total']:,} analogies have all of "
        f"theirs among them. Held out are {results['held_out_pairs']:,} pairs from the ends of the articles."
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.word_vectors", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each (default 5)")
    parser.add_argument("--quick", action="store_true", help="two seeds, and nothing is written")
    options = parser.parse_args(arguments)
    torch.set_num_threads(2)
    results = measure(2 if options.quick else options.seeds)
    results |= {
        "machine": machine.describe(),
        "provenance": machine.provenance(2, arguments, "benchmarks.word_vectors"),
    }
    made = f"{facts(results)}\n\n{table(results)}"
    if not options.quick:
        (RESULTS / "word-vectors.json").write_text(dump(results))
        report.insert(machine.ROOT / "docs" / "tokens.md", "word-vectors", made)
    print(f"\n{made}")


if __name__ == "__main__":
    main(sys.argv[1:])
