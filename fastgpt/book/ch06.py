"""Chapter 6, classification: spam data, losses and accuracy at the last position, training, and the classifier.

`calc_loss_batch`, `calc_loss_loader` and `evaluate_model` are this chapter's; chapter 5 has others of the same names.
"""

from fastgpt.finetuning.classification import (
    SpamDataset,
    calc_accuracy_loader,
    calc_loss_batch,
    calc_loss_loader,
    classify_review,
    create_balanced_dataset,
    evaluate_model,
    plot_values,
    random_split,
    train_classifier_simple,
)
from fastgpt.finetuning.downloads import download_and_unzip_spam_data

__all__ = [
    "SpamDataset",
    "calc_accuracy_loader",
    "calc_loss_batch",
    "calc_loss_loader",
    "classify_review",
    "create_balanced_dataset",
    "download_and_unzip_spam_data",
    "evaluate_model",
    "plot_values",
    "random_split",
    "train_classifier_simple",
]
