"""The figures of the page. Each function returns a figure, or says in a sentence why there is none."""
