"""
What was said in training in a state like this one: nearest neighbour machine translation (Khandelwal et al. 2021,
https://arxiv.org/abs/2010.00710), for a model that has learnt its clips by heart and must now speak of others.

Every word of every training sentence is kept beside the LLM's state before it. When the LLM is about to write, the k
states nearest to its own vote for their words, and the vote is mixed with what the LLM itself says:

    p(word) = (1 - share) p_LLM(word) + share sum of w_i over the neighbours i whose word it is,
    w_i proportional to exp(-sharpness d_i / mean of the k d), d_i the squared distance

Dividing by the mean makes one sharpness fit all LLMs: the paper's temperature has to be found anew for each.
"""
import torch

from lib.program import BadInput

SHARE, SHARPNESS = 0.4, 10.0  # by the loss on dev, docs/results.md


class Neighbours:
    """
    Stands in the place of a LLaMA's `head`: states (..., dim) -> log-probabilities (..., vocab), in float32.
    Its memory: dim + 2 numbers of float32 for each word of training, 1.8 GB for PHOENIX-2014T's and a width of 4096.
    """

    @torch.inference_mode()
    def __init__(self, sllama, batches, k, progress=None):
        """
        batches: data.Batch with targets, of train clips; k: neighbours, at most as many as there are words of them.
        progress: called with the number of clips read. BadInput where their features are of another width.
        """
        llm, self.logits = sllama.llm, sllama.llm.head
        states, words, clips = [], [], 0
        llm.head = lambda h: h
        for batch in batches:
            if batch.features.shape[1] != len(sllama.mean):
                raise BadInput(f"neighbours={k}: the train clips have features of width {batch.features.shape[1]}, "
                               f"the run was trained on {len(sllama.mean)}")
            states.append(llm(h=sllama.embed(batch), lens=batch.lens, at=batch.target_at)[0].float())  # (M, dim)
            words.append(batch.targets)
            clips += len(batch.lens)
            if progress:
                progress(clips)
        llm.head = self
        self.states, self.words = torch.cat(states), torch.cat(words)
        self.squares = self.states.square().sum(1)
        self.k = min(k, len(self.words))

    def __call__(self, h):
        at = h.flatten(0, -2).float()  # (rows, dim)
        distance = torch.addmm(self.squares, at, self.states.T, alpha=-2) + at.square().sum(1, keepdim=True)
        near, which = distance.clamp_min(1e-6).topk(self.k, largest=False)  # (rows, k); never 0 / 0, nor below 0
        weight = torch.softmax(-SHARPNESS * near / near.mean(1, keepdim=True), 1)
        p = (1 - SHARE) * self.logits(h).flatten(0, -2).float().softmax(1)  # (rows, vocab)
        return p.scatter_add_(1, self.words[which], SHARE * weight).log().unflatten(0, h.shape[:-1])
