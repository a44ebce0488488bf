"""Problems, prompts around them, and whether an answer is right. Start with docs/tasks.md."""
