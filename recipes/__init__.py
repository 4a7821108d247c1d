"""Stories that run models, each one flat program."""
