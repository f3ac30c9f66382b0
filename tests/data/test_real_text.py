"""The built-in text as the registry serves it; downloaded on the first run, read from the cache afterwards."""

from hf_llmkernel.data import load_documents, split_documents


def test_bbc_is_what_the_protocol_says():
    articles = load_documents("bbc")
    assert len(articles) == len(set(articles)) == 2127
    calibration, evaluation = split_documents(articles)
    assert len(evaluation) == 214
    assert set(calibration).isdisjoint(evaluation)
