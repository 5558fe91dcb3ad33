"""Short excerpts in the public domain: Charles Dickens, A Tale of Two Cities (1859); William Shakespeare, Hamlet."""

NOVEL = """It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness,
it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of Darkness,
it was the spring of hope, it was the winter of despair, we had everything before us, we had nothing before us, we were
all going direct to Heaven, we were all going direct the other way, in short, the period was so far like the present
period, that some of its noisiest authorities insisted on its being received, for good or for evil, in the superlative
degree of comparison only.

There were a king with a large jaw and a queen with a plain face, on the throne of England; there were a king with a
large jaw and a queen with a fair face, on the throne of France. In both countries it was clearer than crystal to the
lords of the State preserves of loaves and fishes, that things in general were settled for ever.
"""

PLAYS = """BERNARDO:
Who's there?

FRANCISCO:
Nay, answer me: stand, and unfold yourself.

BERNARDO:
Long live the king!

FRANCISCO:
Bernardo?

BERNARDO:
He.

FRANCISCO:
You come most carefully upon your hour.

BERNARDO:
'Tis now struck twelve; get thee to bed, Francisco.

FRANCISCO:
For this relief much thanks: 'tis bitter cold,
And I am sick at heart.

BERNARDO:
Have you had quiet guard?

FRANCISCO:
Not a mouse stirring.

BERNARDO:
Well, good night.
If you do meet Horatio and Marcellus,
The rivals of my watch, bid them make haste.

FRANCISCO:
I think I hear them. Stand, ho! Who's there?

HORATIO:
Friends to this ground.

MARCELLUS:
And liegemen to the Dane.

HORATIO:
A piece of him. Tush, tush, 'twill not appear.

MARCELLUS:
Horatio says 'tis but our fantasy,
And will not let belief take hold of him
Touching this dreaded sight, twice seen of us:
Therefore I have entreated him along
With us to watch the minutes of this night.

BERNARDO:
Sit down awhile;
And let us once again assail your ears,
That are so fortified against our story
What we have two nights seen.

HORATIO:
Well, sit we down,
And let us hear Bernardo speak of this.
Before my God, I might not this believe
Without the sensible and true avouch
Of mine own eyes.
"""
