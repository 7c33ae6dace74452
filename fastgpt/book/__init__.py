"""The chapters of the book by number: re-exports only, `from fastgpt.book.ch04 import GPTModel`."""
