from . import reference


def logprob_entropy(logits, ids, *, temperature=1.0, mask=None, impl=None):
    return reference.logprob_entropy(logits, ids, temperature=temperature, mask=mask)
