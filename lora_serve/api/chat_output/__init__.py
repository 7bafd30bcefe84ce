"""From a chat model's generated text to text, reasoning and tool calls."""
