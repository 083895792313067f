"""The hyperparameter search: spaces, proposals, trials on Ray Tune, the study and its report."""
