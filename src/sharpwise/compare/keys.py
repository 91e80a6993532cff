"""The keys of a study file, as `sharpwise.compare.study` checks them and the documentation lists them."""

STUDY_KEYS: dict[str, str] = {
    "name": "of the study, for its page.",
    "arms": "a list of names, or a table by name with the keys of `ARM_KEYS`; two or more.",
    "baseline": "the arm that all others are compared with; the first.",
    "seeds": "final runs of every arm, 2 or more; 3.",
    "tokens": "of a run; this or `ratio` has to be given.",
    "ratio": "of the tokens of a run to 20 per parameter outside the embeddings.",
    "margin": "nats per token below which a difference does not matter; 0.01.",
    "ablations": "true adds three ablations of every arm that has a learning rate per block.",
    "run": "what all runs share: the tables of a run's configuration, but for what arms and the study say.",
    "lrs": "learning rates that every arm begins with, three or more; around a middle that the optimizer has.",
    "search": "of all arms: lists of values by dotted key, tried one after the other once the learning rate is found.",
    "settings": "of all arms: values by dotted key, under optimizer and schedule.",
    "most": "learning rates that an arm may try where the best lies at an end; 7.",
    "horizons": "shares of the tokens that the baseline is trained on too, for speed-ups; 0.5 and 2.",
}
"""Of the file."""
ARM_KEYS: dict[str, str] = {
    "name": "the optimizer, where the arm is called otherwise.",
    "lrs": "as of the study.",
    "search": "as of the study.",
    "settings": "as of the study.",
    "setting_of": "another arm whose tuned setting it takes; it is not tuned itself then.",
    "lr_times": "times that arm's learning rate; 1.",
    "lr": "its learning rate, found elsewhere; it is not tuned then.",
    "tune": '"roles" searches a factor for every block type.',
    "runs": "of such a search, at most.",
    "types": "block types or roles that it has factors for; all that the model has.",
    "of": 'what the factors are on, in order: "lr", "weight_decay", "beta2" (of 1 - beta2); ["lr"].',
    "lr_only": "those of `types` that have a factor on the learning rate alone; those that fused parameters hold.",
}
"""Of the table of an arm."""
