"""The embedded English-German corpus: a grammar and a vocabulary of both languages."""
