//! Threads that share one piece of work at a time and sleep in between.
//!
//! A job is a number of chunks and a function of the chunk's index. The caller works on it as
//! well, and never waits for a thread that has not begun: it closes the job when no chunk is left
//! and waits only for those that are in the middle of one. Which thread takes which chunk is open,
//! so a chunk's result must not depend on it.
//!
//! ```
//! use kiln_runtime::pool::Pool;
//! use std::sync::atomic::{AtomicUsize, Ordering};
//! let pool = Pool::new(2)?;
//! let sum = AtomicUsize::new(0);
//! pool.run(10, &|chunk| { sum.fetch_add(chunk, Ordering::Relaxed); });
//! assert_eq!(sum.into_inner(), 45);
//! # Ok::<(), std::io::Error>(())
//! ```

use std::any::Any;
use std::cell::UnsafeCell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long a thread looks for the next job before it sleeps: several times what waking costs, so
/// that the gaps inside one run are bridged and an idle program is idle.
const SPIN: Duration = Duration::from_micros(50);

/// Set in [`Shared::gate`] while workers may join the job.
const OPEN: usize = 1 << (usize::BITS - 1);

/// A cache line of its own, so that writing it does not slow down readers of its neighbours.
/// Two lines, in fact: processors fetch them in pairs.
#[repr(align(128))]
struct Line<T>(T);

type Work<'a> = dyn Fn(usize) + Sync + 'a;

/// The job in progress; written by the caller while the gate is closed and nobody is inside.
struct Job {
    work: *const Work<'static>,
    chunks: usize,
    caller: Thread,
}

struct Shared {
    /// Counts jobs; workers wait for it to change.
    epoch: Line<AtomicU32>,
    /// The next chunk that nobody has taken.
    next: Line<AtomicUsize>,
    /// [`OPEN`], and the number of workers inside the job.
    gate: Line<AtomicUsize>,
    /// Number of workers that sleep or are about to.
    asleep: Line<AtomicUsize>,
    /// The caller sleeps, or is about to, until the last worker has left.
    caller_asleep: AtomicBool,
    job: UnsafeCell<Option<Job>>,
    /// The first panic of a worker in this job.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
}

// SAFETY: `job` is the only part that is not `Sync` by itself. It is written by the one caller that
// holds `Pool::busy`, while the gate is closed and no worker is inside, and read by workers that
// are inside; entering and leaving the gate orders these.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer inside is used only while the caller waits in `Pool::run`.
unsafe impl Send for Shared {}

struct Worker {
    asleep: Arc<Line<AtomicBool>>,
    handle: Option<JoinHandle<()>>,
}

/// A pool of threads; dropping it ends them.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<Worker>,
    /// Held by the caller whose job is in progress.
    busy: Mutex<()>,
}

impl Pool {
    /// A pool for work on `threads` threads, the caller's included; 0 means as many as the system
    /// offers to this process.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn new(threads: usize) -> io::Result<Pool> {
        let threads = match threads {
            0 => thread::available_parallelism()?.get(),
            threads => threads,
        };
        let shared = Arc::new(Shared {
            epoch: Line(AtomicU32::new(0)),
            next: Line(AtomicUsize::new(0)),
            gate: Line(AtomicUsize::new(0)),
            asleep: Line(AtomicUsize::new(0)),
            caller_asleep: AtomicBool::new(false),
            job: UnsafeCell::new(None),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
        });
        // A refused thread drops the pool, which ends those that were started.
        let mut pool = Pool { shared, workers: Vec::new(), busy: Mutex::new(()) };
        for index in 1..threads {
            let asleep = Arc::new(Line(AtomicBool::new(false)));
            let (shared, flag) = (pool.shared.clone(), asleep.clone());
            let handle = thread::Builder::new()
                .name(format!("kiln-{index}"))
                .spawn(move || shared.serve(&flag.0))?;
            pool.workers.push(Worker { asleep, handle: Some(handle) });
        }
        Ok(pool)
    }

    /// Number of threads that work on a job, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `work` with every index below `chunks`, each exactly once, and returns when all calls
    /// have. While another thread's job is in progress, or from inside a job, the caller works
    /// alone. A panic of `work` is passed on after all threads have left the job; chunks that
    /// were not begun by then are not run.
    pub fn run(&self, chunks: usize, work: &(dyn Fn(usize) + Sync)) {
        if chunks > 1 && !self.workers.is_empty() {
            match self.busy.try_lock() {
                Ok(_guard) => return self.run_shared(chunks, work),
                // A job that panicked was closed in order all the same.
                Err(TryLockError::Poisoned(poisoned)) => {
                    let _guard = poisoned.into_inner();
                    return self.run_shared(chunks, work);
                }
                Err(TryLockError::WouldBlock) => {}
            }
        }
        (0..chunks).for_each(work);
    }

    fn run_shared(&self, chunks: usize, work: &Work<'_>) {
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. Workers use the pointer only while they are inside the
        // gate, and this function does not return, nor unwind, before they have left.
        let work_static: *const Work<'static> = unsafe {
            std::mem::transmute::<*const Work<'_>, *const Work<'static>>(std::ptr::from_ref(work))
        };
        // SAFETY: `busy` is held and the gate is closed and empty since the last job.
        unsafe {
            *shared.job.get() = Some(Job { work: work_static, chunks, caller: thread::current() });
        }
        shared.next.0.store(0, Ordering::Relaxed);
        shared.gate.0.store(OPEN, Ordering::Release);
        // Ordered before the look at the sleepers: a worker counts itself before it looks at the
        // epoch for the last time, so one of the two sees the other.
        shared.epoch.0.fetch_add(1, Ordering::SeqCst);
        self.wake(chunks - 1);
        let own = catch_unwind(AssertUnwindSafe(|| shared.take_chunks(work, chunks)));
        if own.is_err() {
            shared.next.0.store(chunks, Ordering::Relaxed);
        }
        shared.close();
        let other = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = own.err().or(other) {
            resume_unwind(panic);
        }
    }

    /// Wakes as many workers as are wanted besides those that are awake.
    fn wake(&self, wanted: usize) {
        let asleep = self.shared.asleep.0.load(Ordering::SeqCst);
        let awake = self.workers.len().saturating_sub(asleep);
        let mut missing = wanted.saturating_sub(awake).min(asleep);
        for worker in &self.workers {
            if missing == 0 {
                break;
            }
            if worker.asleep.0.swap(false, Ordering::SeqCst) {
                worker.handle.as_ref().inspect(|handle| handle.thread().unpark());
                missing -= 1;
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.epoch.0.fetch_add(1, Ordering::SeqCst);
        for handle in self.workers.iter_mut().filter_map(|worker| worker.handle.take()) {
            handle.thread().unpark();
            // Workers catch the panics of their jobs.
            let _ = handle.join();
        }
    }
}

impl Shared {
    /// The life of a worker.
    fn serve(&self, asleep: &AtomicBool) {
        let mut seen = 0;
        loop {
            seen = self.wait_for_job(seen, asleep);
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            if self.enter() {
                // SAFETY: inside the gate the job is set and stays as it is.
                let job = unsafe { (*self.job.get()).as_ref() }.expect("an open job is set");
                // SAFETY: `run_shared` does not return before this worker has left.
                let work = unsafe { &*job.work };
                let done = catch_unwind(AssertUnwindSafe(|| self.take_chunks(work, job.chunks)));
                if let Err(panic) = done {
                    self.next.0.store(job.chunks, Ordering::Relaxed);
                    let mut first = self.panic.lock().unwrap_or_else(PoisonError::into_inner);
                    first.get_or_insert(panic);
                }
                self.leave(job.caller.clone());
            }
        }
    }

    fn wait_for_job(&self, seen: u32, asleep: &AtomicBool) -> u32 {
        let changed = || self.epoch.0.load(Ordering::SeqCst) != seen;
        if !spin_until(changed) {
            asleep.store(true, Ordering::SeqCst);
            self.asleep.0.fetch_add(1, Ordering::SeqCst);
            // `wake` takes the flag down, `drop` sets `stop`. A job that came in between did not
            // count this thread as asleep.
            if !changed() {
                while asleep.load(Ordering::SeqCst) && !self.stop.load(Ordering::SeqCst) {
                    thread::park();
                }
            }
            asleep.store(false, Ordering::SeqCst);
            self.asleep.0.fetch_sub(1, Ordering::SeqCst);
        }
        self.epoch.0.load(Ordering::SeqCst)
    }

    fn take_chunks(&self, work: &Work<'_>, chunks: usize) {
        loop {
            let chunk = self.next.0.fetch_add(1, Ordering::Relaxed);
            if chunk >= chunks {
                return;
            }
            work(chunk);
        }
    }

    /// Joins the job if it is open.
    fn enter(&self) -> bool {
        let join = |gate: usize| (gate & OPEN != 0).then_some(gate + 1);
        self.gate.0.fetch_update(Ordering::Acquire, Ordering::Relaxed, join).is_ok()
    }

    /// Leaves the job; the last one out after it was closed wakes the caller.
    fn leave(&self, caller: Thread) {
        let before = self.gate.0.fetch_sub(1, Ordering::SeqCst);
        if before == 1 && self.caller_asleep.load(Ordering::SeqCst) {
            caller.unpark();
        }
    }

    /// Lets no more workers in and waits until all have left.
    fn close(&self) {
        self.gate.0.fetch_and(!OPEN, Ordering::SeqCst);
        let empty = || self.gate.0.load(Ordering::SeqCst) == 0;
        if !spin_until(empty) {
            self.caller_asleep.store(true, Ordering::SeqCst);
            while !empty() {
                thread::park();
            }
            self.caller_asleep.store(false, Ordering::SeqCst);
        }
    }
}

/// Whether the condition became true within [`SPIN`].
fn spin_until(condition: impl Fn() -> bool) -> bool {
    let mut start = None;
    loop {
        for _ in 0..64 {
            if condition() {
                return true;
            }
            std::hint::spin_loop();
        }
        // The clock is read late: most waits end before.
        if start.get_or_insert_with(Instant::now).elapsed() >= SPIN {
            return false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chunk_runs_once() {
        for threads in [1, 2, 4] {
            let pool = Pool::new(threads).expect("threads");
            assert_eq!(pool.threads(), threads);
            for chunks in [0, 1, 2, 3, 64, 1000] {
                let counts: Vec<AtomicUsize> = (0..chunks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(chunks, &|chunk| {
                    counts[chunk].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn many_jobs_in_a_row_with_and_without_gaps() {
        let pool = Pool::new(3).expect("threads");
        let sum = AtomicUsize::new(0);
        for job in 0..20_000 {
            pool.run(4, &|chunk| {
                sum.fetch_add(chunk, Ordering::Relaxed);
            });
            if job % 500 == 0 {
                thread::sleep(Duration::from_micros(200));
            }
        }
        assert_eq!(sum.into_inner(), 20_000 * 6);
    }

    #[test]
    fn both_threads_take_part() {
        let pool = Pool::new(2).expect("threads");
        let names = Mutex::new(std::collections::BTreeSet::new());
        let both = AtomicUsize::new(0);
        // Each of the two chunks waits for the other, so one thread alone would hang.
        pool.run(2, &|_| {
            both.fetch_add(1, Ordering::SeqCst);
            while both.load(Ordering::SeqCst) < 2 {
                thread::yield_now();
            }
            names.lock().expect("names").insert(thread::current().name().map(str::to_string));
        });
        assert!(names.into_inner().expect("names").contains(&Some("kiln-1".to_string())));
    }

    #[test]
    fn several_callers_and_nested_jobs_finish() {
        let pool = Pool::new(2).expect("threads");
        let sum = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        pool.run(3, &|_| {
                            pool.run(2, &|inner| {
                                sum.fetch_add(inner + 1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 4 * 500 * 3 * 3);
    }

    #[test]
    fn a_panic_is_passed_on_and_the_pool_lives() {
        let pool = Pool::new(2).expect("threads");
        for bad in 0..8 {
            let run = || {
                pool.run(8, &|chunk| {
                    thread::sleep(Duration::from_micros(100));
                    assert_ne!(chunk, bad, "chunk {bad} fails");
                })
            };
            let panic = catch_unwind(AssertUnwindSafe(run)).expect_err("a panic");
            let text = panic.downcast_ref::<String>().expect("a message");
            assert!(text.contains(&format!("chunk {bad} fails")), "{text}");
            let sum = AtomicUsize::new(0);
            pool.run(8, &|chunk| {
                sum.fetch_add(chunk, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 28);
        }
    }
}
