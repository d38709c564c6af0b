//! Reading text word by word.

/// What is read, or what is wrong with the text.
pub type Parsed<T> = std::result::Result<T, String>;

/// Loops and values nest no deeper in text; what reads them is recursive.
const MAX_DEPTH: usize = 512;

/// A text and how far it is read.
pub struct Cursor<'a> {
    /// The text.
    pub text: &'a str,
    /// Bytes that are read.
    pub at: usize,
    /// How deep in others what is read now lies.
    pub depth: usize,
}

impl<'a> Cursor<'a> {
    /// What is left, without space before it.
    pub fn rest(&mut self) -> &'a str {
        let rest = self.text[self.at..].trim_start();
        self.at = self.text.len() - rest.len();
        rest
    }

    /// Takes a mark, if it is next.
    pub fn eat(&mut self, mark: &str) -> bool {
        let is_next = self.rest().starts_with(mark);
        self.at += if is_next { mark.len() } else { 0 };
        is_next
    }

    /// Takes a mark that must be next.
    pub fn expect(&mut self, mark: &str) -> Parsed<()> {
        if self.eat(mark) { Ok(()) } else { Err(format!("`{mark}` is missing")) }
    }

    /// What is next as long as its characters belong to it; not taken.
    pub fn span(&mut self, belongs: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        rest.find(|c| !belongs(c)).map_or(rest, |end| &rest[..end])
    }

    /// The word that is next, not taken; empty where a mark is next.
    pub fn peek(&mut self) -> &'a str {
        self.span(|c| c.is_ascii_alphanumeric() || c == '_')
    }

    /// Takes the word that is next.
    pub fn word(&mut self) -> &'a str {
        let word = self.peek();
        self.at += word.len();
        word
    }

    /// What a word means, by `meaning`; the cursor stays at the word where it means nothing.
    pub fn one<T>(&mut self, what: &str, meaning: impl Fn(&str) -> Option<T>) -> Parsed<T> {
        let word = self.peek();
        let found = meaning(word).ok_or_else(|| format!("`{word}` is no {what}"))?;
        self.at += word.len();
        Ok(found)
    }

    /// Takes a number.
    pub fn number<T: std::str::FromStr>(&mut self, what: &str) -> Parsed<T> {
        let word = self.span(|c| c.is_ascii_digit() || c == '-');
        let number = word.parse().map_err(|_| format!("`{word}` is no {what}"))?;
        self.at += word.len();
        Ok(number)
    }

    /// `i3`, or `b3` with another letter.
    pub fn numbered<T: std::str::FromStr>(&mut self, letter: char, what: &str) -> Parsed<T> {
        self.one(what, |word| digits(word, letter)?.parse().ok())
    }

    /// Reads something that holds others of its kind.
    pub fn nested<T>(&mut self, read: impl FnOnce(&mut Self) -> Parsed<T>) -> Parsed<T> {
        if self.depth == MAX_DEPTH {
            return Err(format!("more than {MAX_DEPTH} things within each other"));
        }
        self.depth += 1;
        let result = read(self);
        self.depth -= 1;
        result
    }
}

/// The digits of a word that is a letter and digits.
pub fn digits(word: &str, letter: char) -> Option<&str> {
    let digits = word.strip_prefix(letter)?;
    let all = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    all.then_some(digits)
}
