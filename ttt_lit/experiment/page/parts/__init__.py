"""The page's sections: from a study to blocks."""
