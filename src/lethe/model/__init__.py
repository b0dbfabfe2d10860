"""One Hugging Face model: loading it, replaying a part of it, editing it, saving the edit."""
