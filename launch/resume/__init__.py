"""The run folder as a whole: from which checkpoint a run resumes, and what happens to the files of other steps."""
