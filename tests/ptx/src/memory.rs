//! Memory that knows what has been written, and by whom.

/// Who touched a byte last: the span between barriers, which is counted through a launch, and the
/// thread.
#[derive(Clone, Copy, Default)]
struct Touch {
    span: u32,
    thread: u32,
}

/// Threads of one span, or blocks, of which there were several.
const MANY: u32 = u32::MAX;

/// A piece of memory.
#[derive(Clone)]
pub struct Memory {
    bytes: Vec<u8>,
    known: Vec<bool>,
    /// Bytes that a copy is on its way to.
    awaited: Vec<bool>,
    written: Vec<Touch>,
    read: Vec<Touch>,
}

/// Who touches memory now.
#[derive(Clone, Copy)]
pub struct Who {
    /// The span between barriers.
    pub span: u32,
    /// The first one of the block.
    pub first: u32,
    /// The thread.
    pub thread: u32,
}

impl Who {
    /// Whether something was done by others who were not waited for. 0 is before the launch.
    fn meets(self, touch: Touch) -> bool {
        let other_block = touch.span < self.first || touch.span == MANY;
        let beside = touch.span == self.span && touch.thread != self.thread;
        touch.span != 0 && (other_block || beside)
    }
}

impl Memory {
    /// Memory that holds these bytes.
    pub fn given(bytes: &[u8]) -> Memory {
        Memory { known: vec![true; bytes.len()], ..Memory::fresh(bytes.len()) }.with(bytes)
    }

    fn with(mut self, bytes: &[u8]) -> Memory {
        self.bytes.copy_from_slice(bytes);
        self
    }

    /// Memory that nothing has been written to.
    pub fn fresh(len: usize) -> Memory {
        let touches = vec![Touch::default(); len];
        let (bytes, known, awaited) = (vec![0xa5; len], vec![false; len], vec![false; len]);
        Memory { bytes, known, awaited, written: touches.clone(), read: touches }
    }

    /// Its bytes, if all of them have been written.
    pub fn bytes(&self) -> Result<&[u8], String> {
        match self.known.iter().position(|known| !known) {
            None => Ok(&self.bytes),
            Some(at) => Err(format!("byte {at} of {} is never written", self.bytes.len())),
        }
    }

    /// Writes bytes from outside of a launch; false where they are not inside.
    pub fn put(&mut self, at: usize, bytes: &[u8]) -> bool {
        let range = at..at.saturating_add(bytes.len());
        let Some(place) = self.bytes.get_mut(range.clone()) else { return false };
        place.copy_from_slice(bytes);
        self.known[range].fill(true);
        true
    }

    /// Bytes from outside of a launch, if all of them have been written.
    pub fn get(&self, at: usize, len: usize) -> Result<&[u8], String> {
        let range = at..at.saturating_add(len);
        let outside = || format!("bytes {range:?} of {} are outside", self.bytes.len());
        let bytes = self.bytes.get(range.clone()).ok_or_else(outside)?;
        match self.known[range].iter().position(|known| !known) {
            None => Ok(bytes),
            Some(i) => Err(format!("byte {} of {} is never written", at + i, self.bytes.len())),
        }
    }

    /// Number of bytes.
    pub fn size(&self) -> usize {
        self.bytes.len()
    }

    /// Forgets who touched it.
    pub fn settle(&mut self) {
        self.written.fill(Touch::default());
        self.read.fill(Touch::default());
    }

    fn place(&self, at: u64, size: usize) -> Result<usize, String> {
        let len = self.bytes.len();
        let inside =
            usize::try_from(at).ok().filter(|at| at.checked_add(size).is_some_and(|e| e <= len));
        let at = inside.ok_or_else(|| {
            format!("{size} bytes at byte {} of {len} are out of bounds", at as i64)
        })?;
        match at.is_multiple_of(size) {
            true => Ok(at),
            false => Err(format!("{size} bytes at byte {at} are not aligned")),
        }
    }

    /// Reads some bytes.
    pub fn load(&mut self, at: u64, size: usize, who: Who) -> Result<&[u8], String> {
        let at = self.place(at, size)?;
        for i in at..at + size {
            if self.awaited[i] {
                return Err(format!("byte {i} is read before a copy to it is waited for"));
            }
            if !self.known[i] {
                return Err(format!("byte {i} is read before it is written"));
            }
            if who.meets(self.written[i]) {
                return Err(format!("a race: byte {i} is read, and written by {}", self.writer(i)));
            }
            let read = &mut self.read[i];
            *read = match *read {
                Touch { span: 0, .. } => Touch { span: who.span, thread: who.thread },
                t if t.span == MANY || t.span < who.first => Touch { span: MANY, thread: MANY },
                t if t.span == who.span && t.thread != who.thread => {
                    Touch { span: who.span, thread: MANY }
                }
                _ => Touch { span: who.span, thread: who.thread },
            };
        }
        Ok(&self.bytes[at..at + size])
    }

    /// Writes some bytes.
    pub fn store(&mut self, at: u64, bytes: &[u8], who: Who) -> Result<(), String> {
        let at = self.place(at, bytes.len())?;
        for (i, byte) in (at..).zip(bytes) {
            if self.awaited[i] {
                return Err(format!("byte {i} is written before a copy to it is waited for"));
            }
            if who.meets(self.written[i]) {
                return Err(format!(
                    "a race: byte {i} is written twice, by {} too",
                    self.writer(i)
                ));
            }
            if who.meets(self.read[i]) {
                let other = Touch { ..self.read[i] };
                let name =
                    if other.thread == MANY { "others".into() } else { other.thread.to_string() };
                return Err(format!("a race: byte {i} is written, and read by {name}"));
            }
            self.written[i] = Touch { span: who.span, thread: who.thread };
            (self.bytes[i], self.known[i]) = (*byte, true);
        }
        Ok(())
    }

    /// Says that a copy is on its way to what was just stored; of a late one nothing is there yet.
    pub fn leaves(&mut self, at: u64, size: usize, late: bool) {
        let all = at as usize..at as usize + size;
        self.awaited[all.clone()].fill(true);
        if late {
            self.bytes[all].fill(0xa5);
        }
    }

    /// The end of a copy.
    pub fn arrives(&mut self, at: u64, bytes: &[u8], who: Who) -> Result<(), String> {
        self.awaited[at as usize..at as usize + bytes.len()].fill(false);
        self.store(at, bytes, who)
    }

    fn writer(&self, at: usize) -> String {
        format!("thread {}", self.written[at].thread)
    }
}
