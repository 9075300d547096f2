"""Function words, which name nothing that can be seen.

Short on purpose: lists made for text search also drop "fire", "face", "big" or "men".
Only what a phrase cannot begin or end with: articles, prepositions, conjunctions, pronouns,
auxiliaries, and words for the picture itself.
"""

_WORDS = {
    "ar": "في من على إلى عن مع و أو ثم أن هذا هذه ذلك تلك هو هي هم التي الذي كان كانت صورة",
    "de": "der die das den dem des ein eine einen einem einer eines und oder aber mit ohne von vom"
    " zu zum zur in im ins an am auf aus bei beim für über unter vor nach neben zwischen durch um"
    " als wie ist sind war waren wird werden hat haben es er sie ihr sein seine ihre auch nicht"
    " dieser diese dieses foto bild",
    "en": "a an the and or but nor of in on at to from by with without for as into onto over under"
    " above below near beside behind between through during is are was were be been being am has"
    " have had do does did it its he she they his her their our my your this that these those"
    " there here who which what when where while not no very some any each than then so such"
    " photo photograph picture image jpg jpeg png gif",
    "es": "el la los las un una unos unas y e o u pero de del al a en con sin por para sobre bajo"
    " entre desde hasta como es son era fue está están hay su sus que se lo le este esta estos"
    " estas foto imagen",
    "fa": "و یا در از به با برای بر که را این آن یک است بود هست می روی زیر کنار عکس تصویر",
    "fr": "le la les l un une des du de d et ou mais à au aux en dans sur sous avec sans par pour"
    " entre vers chez comme est sont était a ont son sa ses leur leurs ce cette ces qui que se il"
    " elle photo image",
    "id": "yang dan atau di ke dari pada dengan tanpa untuk oleh dalam atas adalah ialah itu ini"
    " sebuah seorang seekor para foto gambar",
    "it": "il lo la i gli le l un uno una e ed o ma di del dello della dei degli delle a al alla"
    " ai alle da dal dalla in nel nella nei su sul sulla con senza per tra fra come è sono era ha"
    " suo sua suoi sue che si questo questa foto immagine",
    "ja": "の に は を が と で へ も や 写真 画像",
    "ko": "및 또는 와 과 의 에 에서 를 을 이 가 은 는 그 이것 저것 사진 이미지",
    "pt": "o a os as um uma uns umas e ou mas de do da dos das em no na nos nas ao à aos às com"
    " sem por para sobre sob entre como é são era foi está estão há seu sua seus suas que se este"
    " esta foto imagem",
    "ru": "и а но или в во на с со к ко о об от до из у за по под над при для без между как это"
    " этот эта эти его её их он она они был была были есть не фото изображение",
    "tr": "ve veya ile ama bir bu şu o da de ki için gibi üzerinde altında içinde yanında var olan"
    " fotoğraf resim",
    "zh": "的 了 和 与 與 或 在 是 这 這 那 之 于 於 从 從 被 把",
}
STOP_WORDS = {language: frozenset(words.casefold().split()) for language, words in _WORDS.items()}
