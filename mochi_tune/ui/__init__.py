"""The web page over the same verbs: it writes their files, starts them as processes, and reads what they write."""
