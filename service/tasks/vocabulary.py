"""English word lists by which signals and surface features read the form of a request."""

from __future__ import annotations

import re

WORD = re.compile(r"[^\W\d_]+(?:['’][a-z]+)?")  # over lower-cased text


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


AUXILIARIES = _words("""
is isn't are aren't was wasn't were weren't do does doesn't don't did didn't can can't could couldn't would wouldn't
will won't should shouldn't has have had hasn't haven't might may must
""")  # open a yes/no question

QUESTION_WORDS = _words("""
what what's who who's whom whose when where where's why which how how's
""")  # open a question that is not yes/no

NUMBER_WORDS = _words("""
one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen twenty thirty forty fifty hundred thousand dozen dozens half twice thrice third quarter double triple
""")  # count as numbers

EXPLAIN = _words("""
explain why describe discuss justify elaborate reason reasons reasoning compare essay prove
""")  # ask for reasons

IMPERATIVES = _words("""
write draft compose explain describe summarise summarize condense shorten simplify translate rewrite rephrase reword
reply respond tell create suggest plan discuss outline brainstorm recommend imagine generate continue act pretend play
simulate make give list name show help teach walk implement refactor optimise optimize fix debug proofread improve
correct edit polish extract pull convert turn format return add define compare prove derive invent come prepare design
build set be let's let talk analyse analyze comment rank propose provide introduce advise organise organize schedule
search change update review assign categorise categorize sell critique criticise criticize keep send remind sum
""")  # ask for work that `general` does

FIRST_PERSON = _words("""
i i'm i've i'd i'll my me mine we we're we've our us
""")  # the writer

LETTER_WORDS = _words("""
letter letters vowel vowels consonant consonants concatenate concatenated concatenating backwards backward reverse
reversed alphabetical alphabetically acronym initials palindrome string anagram spell uppercase lowercase
""")  # manipulation of letters

STATE_WORDS = _words("""
coin heads tails flip flips flipped switch toggle toggles toggled press presses pressed turns swap swaps swapped face
""")  # manipulation of states

OPINION = _words("""
good great bad best worst better worse terrible awful horrible boring bored dull excellent amazing wonderful fantastic
superb brilliant perfect perfectly poor poorly disappointing disappointed disappointment love loved loves lovely hate
hated enjoyed enjoyable fun funny hilarious charming charm clever witty wit smart stupid silly lame mess messy fails
failed failure flat weak strong beautiful beautifully gorgeous stunning moving touching powerful compelling engaging
engrossing entertaining predictable cliché cliched cliches tedious tiresome waste wasted worth worthy recommend
recommended impressive impressed delight delightful pleasant pleasing annoying frustrating cheap sturdy comfortable
uncomfortable delicious tasty bland overpriced rude friendly broke broken junk garbage rubbish masterpiece gem treat
joy joyless joyous ugly pathetic painful painfully thrilling gripping riveting fascinating interesting uninteresting
pointless ridiculous absurd shallow hollow heartfelt honest sincere sweet sappy sentimental fresh stale original
inspired uninspired inspiring satisfying unsatisfying lacks lacking suffers succeeds mediocre forgettable memorable
clumsy clunky slow overlong uneven tired tense suspenseful scary creepy bizarre odd quirky elegant graceful subtle
poignant haunting lazy generic formulaic refreshing magnificent marvelous outstanding remarkable solid decent nice
useless faulty defective happy unhappy excited satisfied dissatisfied avoid regret unconvincing convincing intelligent
nicer divine heavenly spotless immaculate comfy generous kind smelled smells leaks wobbles crashes replaced
""")  # judge something

REVIEWED = _words("""
film films movie movies picture comedy drama thriller documentary romance sequel plot script screenplay dialogue
acting actor actors actress performance performances cast director direction character characters scene scenes ending
cinema hollywood humor humour laughs jokes audience viewer viewers story storytelling product item quality service
staff food restaurant hotel purchase price seller delivery customer stars album
""")  # what reviews are about

FOREIGN = _words("""
der das und nicht ein eine einen ich ist wie für mit auf zu dem von wir sie kann mir le les des une est que qui
pour dans sur pas je tu il nous vous avec du au el los las una por para como mi su es del cuál qué di che non il
lo gli della sono mi het een niet ik wat hoe voor mijn de uma não com meu jak nie się na czy och att det jag
""")  # function words of other languages in Latin letters
