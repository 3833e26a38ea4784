"""The OpenAI API's completions, chat, models and tokens: fields in, replies and chunks out."""
