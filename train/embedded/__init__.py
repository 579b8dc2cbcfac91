"""The grammar and the vocabulary behind `embedded_translation`: German, English, and what is said in both."""
