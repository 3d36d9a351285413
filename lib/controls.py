"""
What has not looked: the same model under features that are not the clip's, and sentences that need no model at all.
"""
from collections import Counter

import torch

from lib.program import BadInput
from lib.tensors import stateless

CONTROLS = ("shuffle", "blank", "noise")


def controlled(features, control, seed, mean, std):
    """The features that a control puts in the place of the real ones, a list of (T, D); mean, std (D,) of real ones."""
    n = len(features)
    if control == "shuffle":  # one cycle through all clips: nobody keeps his own
        if n < 2:
            raise BadInput("control=shuffle: needs two clips at least")
        order = stateless(seed, "shuffle").permutation(n)
        another = dict(zip(order, [*order[1:], order[0]]))
        return [features[another[i]] for i in range(n)]
    if control == "blank":
        return [torch.zeros_like(f) for f in features]
    if control == "noise":  # as large as real features, frame by frame
        draw = lambda i, shape: torch.from_numpy(stateless(seed, "noise", i).standard_normal(shape, "float32"))
        return [mean + std * draw(i, f.shape) for i, f in enumerate(features)]
    return features


def averages(features, mean, std):
    """Features of clips, each (T, D) -> the mean of each, standardised (clips, D)."""
    return torch.stack([((f.float() - mean) / std).mean(0) for f in features])


def baselines(clips, train, mean, std):
    """What needs no LLM: {name: [sentence]}, the train sentence of the nearest mean feature, and the most frequent."""
    distance = torch.cdist(*(averages(map(some.features, range(len(some))), mean, std) for some in (clips, train)))
    number = {row["name"]: j for j, row in enumerate(train.rows)}
    for i, row in enumerate(clips.rows):
        if row["name"] in number:
            distance[i, number[row["name"]]] = float("inf")  # split=train: nobody finds himself
    texts = [row["text"] for row in train.rows]
    return {"nearest training clip": [texts[j] for j in distance.argmin(1)],
            "most frequent sentence": [Counter(texts).most_common(1)[0][0]] * len(clips)}
