"""What each score says of an input, in a sentence, ours first. A higher score means brittler."""

from __future__ import annotations

MEANINGS = {
    "late path": "The prediction's lead in log probability, averaged over the later half of training, is small: it was "
    "settled late or kept changing.",
    "late path at the reference": "The late path's lead at a small probe, carried on in a straight line to the "
    "severity at which failures are counted, is small or gone.",
    "kernel machine": "The training labels, carried to the input by the network's own path kernel with all its "
    "directions weighed alike, speak for another class, or hardly for this one.",
    "lack of support": "The training examples that hold the prediction up are nearly cancelled by those against it.",
    "predicted severity": "A small probe takes so much of the margin that a straight line has it gone early.",
    "reach": "A short search for the radius at which the margin is gone ends near the input.",
    "predicted distance": "A small step against the margin takes so much of it that it will be gone nearby.",
    "softmax confidence": "The probability of the predicted class is low.",
    "entropy": "The probabilities are spread over many classes.",
    "energy": "All logits together are low, as they are on inputs unlike the training data.",
    "logit margin": "The predicted class's logit is close to the runner-up's.",
    "input-gradient norm": "The loss of the predicted class is steep at the input.",
    "first-order distance": "The nearest class boundary of the linearised model is near.",
    "margin after one step": "After one finite step against the margin little of it is left.",
    "margin after K steps": "A descent with as many gradient passes as our scores take leaves little margin.",
    "trust score": "Training examples of other classes are nearer to the input than those of the predicted class.",
    "trust score on features": "The same distances, in the features that enter the last layer.",
    "nearest-neighbour ratio": "The nearest training example of the predicted class is far, in features, beside the "
    "nearest of any other class.",
    "extrapolated margin": "The final network's own lead at a small probe, carried on in a straight line to the "
    "severity at which failures are counted, is small or gone.",
}
