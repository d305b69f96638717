"""The bundled corpus: eight generated instruction domains for clients and a general one, for a tiny model on a CPU.

Every domain has three parts: ``pretrain``, ``train`` (a client's) and ``test`` (the same client's). Prompt templates
and entities of the parts are disjoint, so a test example is new in wording and in content. In pre-training a domain
answers in a few plain forms; in train and test it has a house style of its own, which a client has to learn along
with the content. The general domain is pre-trained on and measures what fine-tuning forgets. Texts are made by rule:
nothing is downloaded.

Example:
    >>> generate("arithmetic", "train", 1, seed=0)[0].response.startswith("= ")
    True
"""

from fedgraft.data.corpus.domain import Part
from fedgraft.data.corpus.generation import (
    CLIENT_DOMAINS,
    CORPUS_VERSION,
    GENERAL,
    CorpusExample,
    CorpusQuestion,
    corpus_fingerprint,
    generate,
    generate_questions,
)

__all__ = [
    "CLIENT_DOMAINS",
    "CORPUS_VERSION",
    "GENERAL",
    "CorpusExample",
    "CorpusQuestion",
    "Part",
    "corpus_fingerprint",
    "generate",
    "generate_questions",
]
