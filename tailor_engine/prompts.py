"""What a model is asked when it writes a corpus: templates with weights, and their topics."""

from __future__ import annotations

# Weights: long factual prose first, since that kind recovered most of a real corpus' worth.
TEMPLATES: tuple[tuple[int, str], ...] = (
    (6, "Write an encyclopedia article about {topic}."),
    (4, "Write a detailed article about the history of {topic}."),
    (4, "Tell a true story about {topic}."),
    (4, "Write about the life of a person who changed {topic}."),
    (3, "Write a news report about {topic}."),
    (3, "Explain {topic} to a student in several paragraphs."),
    (2, "Write a long essay on {topic}."),
    (2, "Describe how {topic} came about, with names, places and dates."),
    (2, "What are the most important facts about {topic}? Answer in full sentences."),
    (1, "Write a step-by-step guide for a beginner who wants to know more about {topic}."),
    (1, "Write a letter to a friend about {topic}."),
    (1, "Write a dialogue between two people who disagree about {topic}."),
    (1, "List ten surprising things about {topic} and explain each of them."),
    (1, "Write a short story in which {topic} plays a part."),
    (1, "Write a review of a book about {topic}."),
    (1, "Write the opening chapter of a textbook on {topic}."),
    (1, "Compare two views of {topic} and weigh them."),
    (1, "Write a speech about {topic}."),
    (1, "Write a small computer program that has to do with {topic}, and explain it."),
    (1, "Pose five problems about {topic} and solve them."),
)

TOPICS: tuple[str, ...] = tuple(
    """
    the Roman Empire; the French Revolution; the Silk Road; the Black Death; the Ottoman Empire;
    ancient Egypt; the Maya; the Vikings; the Mongol Empire; the Industrial Revolution; the First
    World War; the Second World War; the Cold War; the American Civil War; apartheid; the
    Renaissance; the Reformation; the Age of Exploration; feudal Japan; the Ming dynasty; the
    Kingdom of Kongo; the Inca roads; the printing press; the abolition of slavery; suffrage;
    volcanoes; earthquakes; glaciers; coral reefs; deserts; rainforests; hurricanes; the oceans;
    rivers and floods; the Himalaya; the Amazon; the Arctic; the Sahara; Antarctica; islands; the
    Sun; the Moon landing; black holes; comets; the planet Mars; the Milky Way; telescopes;
    satellites; space stations; rockets; the Big Bang; gravity; light; magnetism; electricity;
    atoms; the periodic table; chemical reactions; acids; metals; crystals; water; the atmosphere;
    evolution; genetics; cells; bacteria; viruses; fungi; mosses; trees; flowers; insects; bees;
    butterflies; spiders; sharks; whales; frogs; snakes; dinosaurs; owls; penguins; wolves;
    horses; cats; dogs; elephants; bats; the human heart; the brain; sleep; vaccines; antibiotics;
    surgery; diabetes; cancer research; nutrition; nursing; mental health; public health;
    childbirth; ageing; mathematics; probability; geometry; prime numbers; algebra; statistics;
    logic; cryptography; computers; the Internet; programming languages; databases; robots; video
    games; artificial minds; telephones; radio; television; film; photography; newspapers;
    libraries; museums; schools; universities; law courts; constitutions; elections; parliaments;
    taxes; banks; money; inflation; trade unions; insurance; stock markets; the United Nations;
    human rights; refugees; migration; railways; bridges; ships; canals; aeroplanes; bicycles;
    cars; lighthouses; harbours; tunnels; cathedrals; castles; skyscrapers; gardens; city
    planning; housing; roads; sewers; power stations; wind power; nuclear energy; coal mining;
    petroleum; steel; glass; paper; cotton; leather; plastics; wheat; rice; potatoes; coffee; tea;
    chocolate; cheese; wine; bread; salt; sugar; spices; fishing; beekeeping; dairy farming;
    cooking; baking; sewing; carpentry; pottery; blacksmithing; clocks; painting; sculpture;
    opera; jazz; the violin; the piano; folk songs; ballet; theatre; poetry; the novel; fairy
    tales; epic poems; comic books; architecture; calligraphy; fashion; jewellery; football;
    cricket; baseball; basketball; tennis; chess; swimming; the Olympic Games; mountaineering;
    boxing; cycling races; sailing; skiing; horse racing; philosophy; ethics; Buddhism; Islam;
    Christianity; Judaism; Hinduism; Greek mythology; Norse mythology; pilgrimage; monasteries;
    weddings; funerals; holidays; family life; friendship; travel; hotels; street markets; post
    offices; firefighters; police work; detectives; sailors; soldiers; pirates; explorers;
    inventors; engineers; a small village; a royal family; a lost city; a famous battle; a court
    case; a shipwreck; a scientific mistake; an election; an expedition; a flood; a long drought;
    a school teacher
    """.replace("\n   ", "")
    .strip()
    .split("; ")
)
