"""The canonical expressions: AffectNet's names, a class's id being its place."""

EXPRESSIONS = ("Neutral", "Happy", "Sad", "Surprise", "Fear", "Disgust", "Anger", "Contempt")
